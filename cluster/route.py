"""Which shard a row belongs to: a hash of its primary key, the same on every node and in every version.

A collection lists its shards, one for each virtual channel; the control group's placements say who holds a shard. So
from key to nodes it is one hash and two look-ups in tables, whatever the ring looks like.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar
from zlib import crc32

import numpy as np
import numpy.typing as npt

from storage.types import PartitionId

Keys = npt.NDArray[np.int64] | Sequence[str]
Place = TypeVar("Place")

SHORT_WAYS_MAX: Final = 64
"""Up to so many channels, if they are a power of two, few bits of a hash tell which is a key's."""


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


def number_finder(table: Sequence[Place]) -> Callable[[int], Place]:
    """Return a look-up of one Int64 key in a table that has an entry for each channel, as by `channel_of`, but faster.

    Where the number of channels is a power of two 2**k, the channel is bits 0 to k-1 of the hash. They come from bits 0
    to k-1 and 31 to 30+k of its last product, those from as many low bits of the factors, those in turn from bits
    below 58+k of the product before: of 64 bits up to k = 6, so that it need not be cut to 64 bits, and the last one is
    of short numbers.
    """
    ways = len(table)
    last = ways - 1
    low = (ways << 31) - 1
    factor = 0x94D049BB133111EB & low

    def find(key: int) -> Place:
        key += 0x9E3779B97F4A7C15  # more than 2**63, so that no Int64 stays negative
        if key > 0xFFFFFFFFFFFFFFFF:
            key &= 0xFFFFFFFFFFFFFFFF
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9
        key = ((key ^ key >> 27) & low) * factor
        return table[(key ^ key >> 31) & last]

    def find_any(key: int) -> Place:
        return table[channel_of(key, ways)]

    return find_any if ways & last or ways > SHORT_WAYS_MAX else find


def text_finder(table: Sequence[Place]) -> Callable[[str], Place]:
    """Return a look-up of one VarChar key in a table that has an entry for each channel."""
    ways = len(table)
    return lambda key: table[crc32(key.encode()) % ways]


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
