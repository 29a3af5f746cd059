"""Which shard a row belongs to: a hash of its primary key, the same on every node and in every version."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.int64] | Sequence[str]


def hash_keys(keys: Keys) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash per key. Integers are mixed by splitmix64, text by CRC-32 of its UTF-8."""
    if isinstance(keys, np.ndarray):
        with np.errstate(over="ignore"):
            mixed = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            return mixed ^ (mixed >> np.uint64(31))
    return np.fromiter((zlib.crc32(key.encode()) for key in keys), np.uint64, len(keys))


def split(keys: Keys, ways: int) -> list[npt.NDArray[np.int64]]:
    """Return, for each of `ways` virtual channels, the offsets of the keys that belong to it, ascending."""
    if ways == 1:
        return [np.arange(len(keys), dtype=np.int64)]
    owner = hash_keys(keys) % np.uint64(ways)
    return [np.flatnonzero(owner == np.uint64(way)) for way in range(ways)]
