"""One process: the event loop, threads, sockets and the clock around the rooms that decide and keep.

This is the only room that waits. It answers clients, feeds each shard's log to its state machine, hands what takes
time to threads, and closes everything in order. It decides nothing about logs (`cluster`), keeps nothing (`storage`)
and compares no vectors (`index`); it carries between them.

**Words.** A *node* is one process with one data directory. A *group* is a Raft group and its state machine: group 0 is
the control group with the catalogue, group s + 1 is shard s. A *host* runs a group on the loop. A *seam* is what is not
deterministic: disk, chunk store, threads, clock, dice. The *service* is what a client may ask, whatever it speaks.

**The thread rule.** One event loop owns every mutable object. A worker thread is given immutable things (a view, a
batch, bytes) and returns a new one; the loop puts it in place, after looking whether it is still wanted. Nothing blocks
the loop for more than 20 ms; what does is logged with its place (`watchdog.py`). Threads work in lanes, so that a long
build never stands before a short fsync (`workers.py`):

| lane   | what it does                              | who waits    |
|--------|-------------------------------------------|--------------|
| log    | the journal's writes and fsyncs           | every writer |
| disk   | chunks and checkpoints, LevelDB           | upkeep       |
| search | searches and queries                      | readers      |
| parse  | large bodies and large replies            | their client |
| build  | index builds, merging, LevelDB compaction | nobody       |

What else crosses the line between threads: progress and cancellation of a build; the metrics, which count on any
thread; the watchdog, which reads the loop's stack.

**Start** (`app.py`, then `Node.start`):

    settings -> logs -> chunk store (its lock keeps a second process out) -> watchdog -> identity of the directory
    -> journal (a torn end is cut, other damage refuses) -> catalogue and shards from their checkpoints
    -> each group replays its log's tail, and leads -> open changes of the catalogue are finished
    -> chunks that a crash left are removed, upkeep begins -> the port opens -> indexes load: ready

Most of the time of a start are imports. What serves clients is imported by a thread while the data is read
(`front.py`), the gRPC server for its first client (`grpc/late.py`), and what only a command or a file needs by those.

With peers a node opens its groups and its sessions, and then its port; it is ready when all its groups have leaders and
its replicas are whole.

**Stop**, in reverse: the port closes, running requests finish within `api.drain_s_max`, leaderships are handed over,
upkeep ends, a last checkpoint, groups and sessions stop, the journal is written out and closed, threads end, the chunk
store closes. A crash at any moment of either is a start with a longer tail. If the disk cannot be trusted (a failed
fsync), `Node.fail` ends the process at once: no reply, no checkpoint, nothing that would look like a proper end.

**An insert:**

    api/server -> api/entities -> api/rows          bytes to a Batch that fits the schema
      -> database (names to ids) -> write           keys, partitions, virtual channels: one message each
        -> route                                    to the shard's leader, here or over the mesh, until it is decided
        -> group.propose -> cluster.raft -> storage.journal                             appended, not yet durable
             journaling                             one write and fsync for what all groups appended
        -> group._pump -> cluster.shard.apply -> storage.growing                        durable: applied, visible
      <- outcome of each message <- replies

What all groups have applied wakes `upkeep.py`, a set of loops for each shard: seal, flush, load, index (`indexing.py`),
compact (`compacting.py`). Each looks at the state, does the most useful piece that is left, and proposes the outcome as
a message. So nothing is remembered outside the log. What makes messages is done by the shard's leader alone, the rest
by every replica, checkpoints too (`checkpoints.py`).

**Chunks go before their message** (`making.py`). The leader writes an index or merged rows, ships the chunks to the
other replicas (`chunk_transfer.py`), and proposes when a majority has them; a flushed segment's rows each replica
writes. A replica awaits `provision.py` before it applies such a message, and fetches what it lacks. Chunks nobody needs
yet, or that a peer is copying, stay under leases (`chunk_pins.py`). A replica whose log ends before its leader's begins
takes a checkpoint from a peer, step by step (`snapshot.py`). A damaged chunk is taken from a peer wherever it is met. A
leader that dies between shipping and proposing leaves an offer with the others, which its successor proposes. Index
builds and compactions of all shards wait for the same few slots (`slots.py`).

**Overload.** What comes from clients asks `admission.py` for room, which collections share by `fair_queue.py`: an
insert before it is decoded and again at the leader's log, a read before it is looked at. `pressure.py` says when memory
is short, and whose rows wait for it; `crowding.py` then has the largest growing segments sealed, here or by their
leaders.

**Healing.** Every node reads its chunks again (`scrub.py`); every leader has its replicas' states compared at one
position of the log, and has those replaced that are not what most are (`healing.py`); `cluster_check.py` does both at
once for whoever asks (`cluster_check_command.py` prints it).

**A search:**

    api/server -> api/entities                      vectors, parameters, output fields
      -> database -> read                           filter compiled
        -> freshness                                waits until the replicas here may answer at the request's level
        -> subread -> route -> another node         for shards where none here may: the same again there
        -> gathered                                 searches alike in all but their vectors are one call
        -> snapshot                                 views and a tick, taken on the loop
        -> search lane: storage.search              mask, plan, exact or index, merge, fetch
      <- storage.merging                            one answer of several nodes
      <- scores and rows <- replies                 large replies are encoded on a thread

**A change of the catalogue** waits at the leader of the control group until nothing that conflicts with it is under way
(`key_locks.py`). One that shards must see too (a collection, a partition, an index) is a task: `broadcaster.py` has it
noted by the control group, tells every shard, and has it closed. A crash in between leaves the task, which the next
leader finishes. Shards so have a new schema before the catalogue: until the change ends, inserts that they refuse wait
(`write.py`), and reads are by the catalogue's schema, whatever a replica has (`read.py`).

**Nodes** come and go. A newcomer asks any node over HTTP where to prove itself, and is taken up by the control group
(`joining.py`). From then on the control state says who the others are (`members.py`), and the network meets them. The
leader of the control group is *coordinator* (`coordinator.py`): it watches who is up, has `cluster.planner` say what is
next, and proposes it; what follows for its own replicas each node does by itself (`placing.py`). What operators ask is
in `nodes.py` (`node_command.py` asks it).

**Invariants**
  1. A write is acknowledged after it is durable here and applied, never before.
  2. A Strong read sees every write that was acknowledged before it began; the other levels keep their words.
  3. Who waits is answered: with the outcome, an error, or that the outcome is not known.
  4. Client protocols (`api/`) call the service and nothing below it; the service raises only errors of
     `storage.errors`.
  5. Everything not deterministic comes in through `Seams`; the simulation runs a whole node from a seed.

**Other nodes.** `network.py` is the seam, and the bytes of a frame; `peers.py` carries frames over two connections to
each other node (`peer_link.py`), SMALL for consensus and BULK for rows and chunks, which `handshake.py` and TLS
(`peer_tls.py`) prove before anything else of them is read. `calls.py` is the mesh: Raft messages by group, and calls
with deadlines; what a call raises there is raised here. A session is what the SMALL connection is from its proof to its
end: frames arrive in order or the session ends, and with it every call that waits or is served. Nothing that a peer
sends can do more than be refused and counted.

**Where to find it:** `__main__` the command line; `settings`, `config` what can be set, and where from; `app` the
process, `front` what clients see of it; `edge` what both interfaces share; `node` the parts and their order; `group`,
`journaling` logs; `service` what can be asked, `database` the answer (`names` of what, `facts` what shards know of it,
`chores` what their leaders are made to do, `index_request` what an index is to be, `status` what the node says of
itself), `write`, `read` rows (`resolve` what names mean, `answering` what one snapshot says, `batching` searches
together), `route`, `hedging` where to ask, `freshness` what may answer, `subread` reads between nodes, `scope` what a
request carries along; `upkeep` a shard's background (`making`, `indexing`, `compacting`, `checkpoints`, `words`),
`background` a node's; `workers`, `clock`, `disk` the seams of the real world; `check` a directory offline;
`status_tables` what `annulus status` prints; `memory` what is given back; `logs`, `metrics`, `watchdog` what is told;
`api/` HTTP, `grpc/` gRPC, `tunnel` how both share a port, `client_tls`, `certificates` what secures it.
"""
