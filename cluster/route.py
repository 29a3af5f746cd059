"""Which shard a row belongs to: a hash of its primary key, the same on every node and in every version.

A collection lists its shards, one for each virtual channel; the control group's placements say who holds a shard. So
from key to nodes it is one hash and two look-ups in tables, whatever the ring looks like.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from zlib import crc32

import numpy as np
import numpy.typing as npt

from storage.types import PartitionId

Keys = npt.NDArray[np.int64] | Sequence[str]


def hash_keys(keys: Keys) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash per key. Integers are mixed by splitmix64, text by CRC-32 of its UTF-8."""
    if isinstance(keys, np.ndarray):
        with np.errstate(over="ignore"):
            mixed = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            return mixed ^ (mixed >> np.uint64(31))
    return np.frombuffer(array("I", map(crc32, map(str.encode, keys))), np.uint32).astype(np.uint64)


def channel_of(key: int | str, ways: int) -> int:
    """Return the virtual channel of one key, as `channels_of` does for many."""
    if isinstance(key, str):
        return crc32(key.encode()) % ways
    mixed = (key + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ (mixed >> 31)) % ways


def channels_of(keys: Keys, ways: int) -> npt.NDArray[np.int64]:
    """Return, for each key, which of `ways` virtual channels it belongs to."""
    if ways == 1:
        return np.zeros(len(keys), np.int64)
    return (hash_keys(keys) % np.uint64(ways)).astype(np.int64)


def by_number(partitions: Mapping[str, PartitionId]) -> list[PartitionId]:
    """Return the hidden partitions of a collection with a partition key, in the order in which `split` counts them."""
    return [partitions[name] for name in sorted(partitions, key=_number)]


def _number(name: str) -> int:
    """Return the number at the end of a hidden partition's name (`_default_3`)."""
    _, _, number = name.rpartition("_")
    return int(number) if number.isdigit() else 0


def split(keys: Keys, ways: int) -> list[npt.NDArray[np.int64]]:
    """Return, for each of `ways` virtual channels, the offsets of the keys that belong to it, ascending."""
    channels = channels_of(keys, ways)
    return [np.flatnonzero(channels == way) for way in range(ways)]
