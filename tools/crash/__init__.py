"""Kill a node again and again while clients write to it, and hold what it remembers against what it promised.

    python -m tools.crash --rounds 200 --seed 7
    python -m tools.crash --canary            does the checker notice what it should?

A round: clients insert, upsert, delete, flush, compact and rebuild indexes at the same time; at a random moment the
process is ended (SIGKILL; now and then SIGTERM, or SIGTERM and then SIGKILL while it drains); `node check` looks at the
directory; now and then the next start is killed as well, half way; then the node starts and everything is compared.

What is promised, and so checked
  1. An acknowledged write is there once, with exactly its values; an acknowledged delete stays.
  2. A request that nobody answered is wholly there or wholly not, per shard that it went to.
  3. Scan, count(*), get and search tell the same story: each sampled row is found by its own vector at distance 0, no
     deleted row and no older version is ever found, and every score is that of the row shown.
  4. While clients run, a row that nobody is writing reads as it was last acknowledged.
  5. What was acknowledged about collections and indexes (created, dropped) holds after the restart.
  6. `node check` finds the directory sound after every end, and SIGTERM ends the process with 0.

How the model stays simple. Each key belongs to one writer, which waits for its reply, so at most one request is under
way per key. A row's values are a function of key and version, and versions are never used twice: the model is a mapping
key -> version, and the version that is read tells which request wrote it.

Who does what: `rows` the collections and what their rows hold; `model` what must be there; `api` calls and their three
outcomes; `clients` who writes and reads during a round; `verify` reads everything back; `rounds` kills and restarts;
`canary` lies on purpose; `trace` one line per operation.
"""
