"""Who holds what, in which order, and what each message changes.

This room decides and never waits: no event loop, no clock, no chance, no disk of its own. Bytes that a Raft group has
committed come in; a changed state, and an answer for whoever waits, come out. The room to the left (`node`) ticks the
groups, runs what takes time on worker threads and speaks to clients; the rooms to the right hold rows (`storage`) and
vectors (`index`).

**Words.** A *shard* is one Raft group with its log; a *replica* is its copy on one node. A collection's rows are spread
over *virtual channels* by the hash of their primary key, and each channel is bound to one shard for ever (`route.py`).
A *position* is a place in a shard's log. A *tick* is a hybrid timestamp: each applied message has one, they ascend
strictly within a shard, and rows live and die by them (`tick.py`). A *message* is what a log entry says, a *producer*
and *sequence* are who said it and for which time (`message.py`). An *outcome* is the answer to a message. A *task* is a
change of the catalogue that shards must see too. A *checkpoint* is what a replica needs to start without the beginning
of its log. A *chunk* is some bytes of a segment in the store, named by their digest; one that nobody needs is
*garbage*, one that nobody knows of is an *orphan*.

**What flows through.** A write: `node` stamps a message and proposes it (`raft.py`); once committed, `Shard.apply`
decodes it, gives it its tick, looks the producer and sequence up among the outcomes it remembers, and if it is new
changes rows. A change of the catalogue: `BeginDdl` in the control group checks the request and opens a task (`ddl.py`),
every shard concerned is told one message, the last `AckDdl` makes the change visible (`catalog.py`). A segment: rows
grow in memory; `Seal` ends that, `Flushed` says in which chunks they are, `Indexed` in which chunks an index of them
is, `Compacted` puts one segment in the place of several. What takes time in between is done outside, on frozen views,
and comes back as the next message; its product is handed to the replica that made it and read from chunks by the
others.

| file            | holds                                                                              |
|-----------------|------------------------------------------------------------------------------------|
| `message.py`    | the messages of shards and their bytes                                             |
| `parse.py`      | from what a message says to values that fit, or a refusal                          |
| `tick.py`       | hybrid time                                                                        |
| `route.py`      | key to channel                                                                     |
| `raft.py`       | one Raft group: proposals in, committed entries out                                |
| `raft_core.py`  | the door to PySyncObj, which decides who leads and what is committed               |
| `raft_guard.py` | between PySyncObj and the wire: what makes each replica a correct Raft peer        |
| `raft_leader.py`| one leadership: who has what, leases, barriers, transfer                           |
| `raft_wire.py`  | what replicas of a group say to each other                                         |
| `membership.py` | the nodes, and which of them hold which shard: generations and plans               |
| `ring.py`       | the door to uhashring: which nodes shall hold which shard                          |
| `planner.py`    | what the coordinator does next: nodes that are gone, moves, leaderships            |
| `machine.py`    | what all replicated state machines share: ticks, safe retries, a total `apply`     |
| `shard.py`      | the rows of one shard and the life of its segments                                 |
| `checkpoint.py` | freeze, write, install, restore                                                    |
| `catalog.py`    | databases, collections, aliases, indexes: their state and the changes of it alone  |
| `ddl.py`        | the changes of the catalogue that shards must see                                  |
| `resources.py`  | what changes of the catalogue hold while they are made                             |
| `idempotency.py`| requests that clients name, so that each is made once                              |
| `jobs.py`       | compactions that clients asked for                                                 |
| `control.py`    | the control group's state machine around both                                      |

**Promises**, each held by the tests of its file:

  1. *Equal logs, equal states.* After the same prefix of the log two replicas have the same rows, deletes, segments,
     outcomes and ticks; the catalogue is equal to the byte. It does not matter which of them built what, crashed, or
     started from which checkpoint.
  2. *apply is total.* Every message that can be decoded is answered. A refusal changes nothing but position, tick and
     outcomes. Only a fault of this replica is raised, and after it the machine applies nothing and is in no checkpoint.
  3. *Once.* A message is executed once however often it is in the log. A repeat gets the first outcome, or, when that
     is long forgotten, a refusal which says that the outcome is not known.
  4. *Each row once.* A live row is in exactly one segment of its collection, at every position, whatever is merged,
     flushed or restored; a delete that arrives while its row is being merged reaches the merged segment.
  5. *A manifest has its chunks.* The commit of a checkpoint is one synced batch. Every chunk that the committed
     manifest names is in the store, before, during and after any crash; garbage goes only with a manifest that does not
     need it.
  6. *Nothing is left.* After a start has swept, each chunk in the store is needed, or under a lease for a message to
     come or a replica that copies it, or known to be garbage, which the next checkpoint removes.
  7. *A change is seen whole.* A collection is visible when all its shards have it; what a task checked when it began
     holds until it ends.
  8. *A segment's rows are of one version of the schema.* A change of it seals what grows, at one position of each
     shard's log; an insert of another version is refused there. Old segments answer by the newest version.

What is asked of the caller: chunks that are written for a message stay until it is applied, though none of them is
needed yet. They go by their bytes, so what is being written may be the garbage that a checkpoint is removing; a lease
(`node/chunk_pins.py`) keeps the two apart. And a replica applies a message only when it has the chunks that it names.
"""
