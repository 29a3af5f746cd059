"""What is kept: schemas, rows, segments, chunks, and the journal of the shards' logs.

This room knows rows and disks, not peers. It is given ticks and positions and never asks what time it is, so that the
same log gives the same rows everywhere. Nothing here awaits: the event loop calls what changes something, worker
threads call what only reads.

**Words.** A *row* has a primary key, fields, and the *tick* at which it was inserted. A *segment* is rows of one
partition that are sealed, indexed and compacted together; an *offset* is a row's number in it. A *chunk* is about 1 MiB
of one column of a segment, or of an index, named by its digest. A *view* is what a reader sees of a segment. A
*survivor* is a row that is visible and passes the filter.

**A segment's life.** Every step is a message in the log, taken at the same position by every replica:

      Insert               Seal                Flushed               Indexed              Compacted, drops
        |                   |                    |                      |                       |
        v                   v                    v                      v                       v
    +---------+        +---------+         +-----------+          +-----------+            +---------+
    | growing |------->| sealed  |-------->|  flushed  |--------->|  indexed  |----------->| dropped |
    +---------+        +---------+         +-----------+          +-----------+            +---------+
    batches merged      the same parts,     one batch, sorted      vectors live in          chunks go when no
    like a counter,     nothing copied      keys, statistics,      the index; exact         checkpoint names
    key dictionary                          chunks on disk         search uses them         them any more
         |                                        |  ^
         | checkpoint spills rows                 |  |  release keeps keys, ticks and deletes only;
         v                                        v  |  load brings the columns back
      chunks                                    released

    Deletes come in any state: (offset, tick) appended to the segment's own log, never to its rows.

A row is visible at tick T exactly when  expire_before <= inserted <= T < deleted.

**A read** takes the views of a moment (`view.py`), turns visibility and filter into one mask of survivors for each
segment, and plans each on its own: skip, exact, or index (`search.py`). So deletes and filters never shorten an answer.

**The disk.** Under the data directory of a node:

| what                       | where                             | written               | verified by            |
|----------------------------|-----------------------------------|-----------------------|------------------------|
| log entries of all shards  | the journal's files, one stream   | appended, then synced | checksum per record    |
| chunks of columns, indexes | LevelDB, "c" shard digest         | once, synced          | the digest is the name |
| manifest of a shard        | LevelDB, "r" manifest shard       | one synced batch      | digest of key + bytes  |
| spilled rows, deletes      | chunks that the manifest names    | at a checkpoint       | as chunks              |
| word lists of a segment    | LevelDB, "r" words, words-piece   | after a flush         | digest of key + bytes  |

The manifest is the commit point: what it names is there, what it does not name is garbage. Recovery is the manifest and
the journal behind its position.

**Where to find it**, from what is kept to what is asked:

| module                                    | holds                                                                |
|-------------------------------------------|----------------------------------------------------------------------|
| `types`, `errors`, `schema`               | ids and ticks; the error tree; field types and their limits          |
| `analysis` (door to regex and PyStemmer)  | text to terms                                                        |
| `bm25`                                    | what function fields hold, and the statistics that weigh searches    |
| `evolution`                               | from one version of a collection's schema to the next                |
| `columns`, `strings` (door to pyarrow)    | rows as immutable columns, and their bytes                           |
| `disk`, `journal*`                        | the disk seam; the log on disk                                       |
| `chunks` (door to plyvel), `keys`         | chunks and records in LevelDB; the layout of its keys                |
| `segment_files`                           | columns and blobs as chunks                                          |
| `word_files`                              | word lists for text_match, kept by each node for itself              |
| `growing`, `sealed`, `deletes`            | segments                                                             |
| `key_lookup`, `stats`                     | from primary key to offset; bounds of each field                     |
| `filter/`                                 | text to mask                                                         |
| `scalar_index`, `postings`, `candidates`  | indexes for filters: their names, what they are, when they are used  |
| `view`, `search`                          | what a reader sees; the planner                                      |
| `compaction`                              | which segments to write anew, and what comes out                     |

**Invariants**
  1. Rows are immutable. What changes is which rows are dead, and where the columns are.
  2. Offsets keep their meaning for as long as the segment lives.
  3. Within a segment the ticks of rows ascend, and so do the ticks of deletes.
  4. Nothing read from disk is served unless its digest was right.
  5. Equal rows give equal chunks, whatever batches they came in.
"""
