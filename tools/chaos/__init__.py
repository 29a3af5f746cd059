"""A cluster of real processes under load and faults, held to what it acknowledged.

    python -m tools.chaos --minutes 10 --report run.html      all faults, mixed, from a seed
    python -m tools.chaos --only kill-leader --only deaf      these and no others
    python -m tools.chaos --churn --minutes 10                nodes come, go and are replaced as well
    python -m tools.chaos --list                              what each fault is
    python -m tools.chaos failover --kills 50                 how long writes wait for a new leader

A run goes in rounds. In each, clients write and read through any node while faults come and go; then the clients wait,
everything heals, and every node is read back and compared. Which faults come, when, and how bad they are is a function
of the seed (`faults.plan`); what the cluster makes of them depends on timing, so a seed repeats the plan of a run and
not its course. The simulation repeats courses; here are real sockets, files, signals and clocks.

What is promised, and so checked
  1. An acknowledged write is there once, as written, on every node in the end; an acknowledged delete stays; of a
     request that nobody answered all is there or nothing, shard by shard. (The crash test's model and verification.)
  2. Strong reads are linearizable, key by key.
  3. Bounded reads miss nothing that is older than their bound; weaker reads show what was written, wholly or not.
  4. Search, get, scan and count tell the same story on every node.
  5. After the faults every node serves again by itself, and every shard has all its copies; SIGTERM ends a node with 0;
     `annulus check` finds every data directory sound. No process ends that was not made to.

How available it was is measured, not judged: answered and failed requests over time, and the longest gaps around each
fault.

Who does what: `faults` the recipes and the plan; `machines` the processes; `proxy` the network between them; `shim` and
`shim.c` disk and clock from inside a process; `fleet` a good client of all nodes; `registers` the keys that everybody
writes; `run` rounds and verdict; `figures` and `report` what is left to read; `failover` kills of leaders, timed.
"""
