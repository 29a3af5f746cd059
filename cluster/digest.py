"""A digest of a group's state: equal on two replicas exactly when what they must agree on is equal.

Replicas must agree on everything that the log has decided: collections, segments, rows, deletes, ticks and the outcomes
kept for repeats. They need not agree on what checkpoints wrote and when, nor on what is in memory just now.

Rows that are in chunks count by the chunks' names, which are digests of their bytes; that the bytes are still those is
for whoever reads the chunks (`node/healing.py`). Rows that are in no chunk yet count by the names that their chunks
would have: those depend on nothing but the values.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, Final

import cbor2

from cluster.checkpoint import FrozenSegment, FrozenShard, collection_facts, rows_from
from cluster.control import FrozenControl
from storage.segment_files import write_segment

STATE_DIGEST_BYTES: Final = 16
_SHARED: Final = ("position", "tick", "outcomes", "forgotten")
"""What all state machines keep and must agree on."""


def state_digest(frozen: FrozenShard | FrozenControl) -> bytes:
    """Return the digest of a state, in time proportional to its rows that are in no chunk. For a worker thread."""
    own = [frozen.to_bytes()] if isinstance(frozen, FrozenControl) else _shard(frozen)
    shared = frozen.machine.to_plain()
    whole = [own, [shared[name] for name in _SHARED]]
    return blake2b(cbor2.dumps(whole), digest_size=STATE_DIGEST_BYTES).digest()


def _shard(frozen: FrozenShard) -> Any:
    return [
        frozen.next_segment,
        [
            [collection_facts(one.state), [_segment(segment) for segment in one.segments]]
            for one in frozen.collections
        ],
    ]  # fmt: skip


def _segment(one: FrozenSegment) -> Any:
    view = one.view
    files = one.files or write_segment(*rows_from(view, 0))[0]
    indexes = [[index_id, blob.to_dict()] for index_id, blob in sorted(one.indexes.items())]
    return [
        *(view.segment_id, view.partition_id, one.sealed, one.created_tick, one.files is not None),
        *(files.to_dict(), view.deletes.to_bytes(), indexes),
    ]
