"""The frame around a dumped index: what it is, of how many rows, and whether its bytes are the ones that were written.

    magic and version (16) | crc32 of all that follows (4) | kind (16) | metric (8) | rows (8) | dim (4) | parts (4)
    | length of each part (8 each) | the parts

Little-endian. Neither faiss nor nmslib notices a flipped bit in what it loads, and both may crash on it. The chunks
that carry a blob have digests of their own; the crc is for every other way it may come.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Final

from index.metric import Metric
from index.protocol import IndexDamaged

_MAGIC: Final = b"annulus index 1\n"
_FRAME: Final = struct.Struct("<16sI")
_HEAD: Final = struct.Struct("<16s8sQII")


def pack(kind: str, metric: Metric, *, rows: int, dim: int, parts: Sequence[bytes | memoryview]) -> bytes:
    """Return one blob of the parts."""
    head = _HEAD.pack(kind.encode(), metric.encode(), rows, dim, len(parts))
    lengths = struct.pack(f"<{len(parts)}Q", *(len(part) for part in parts))
    crc = 0
    for piece in (head, lengths, *parts):
        crc = zlib.crc32(piece, crc)
    return b"".join((_FRAME.pack(_MAGIC, crc), head, lengths, *parts))


def unpack(blob: bytes, kind: str, metric: Metric, *, rows: int, dim: int, parts: int) -> list[memoryview]:
    """Return the parts, not copied. Raises IndexDamaged unless the blob is whole and of this very description."""
    view = memoryview(blob)
    start = _FRAME.size + _HEAD.size + 8 * parts
    if len(view) < start:
        raise IndexDamaged(f"{len(view)} bytes are too few")
    magic, crc = _FRAME.unpack_from(view)
    if magic != _MAGIC:
        raise IndexDamaged("not a dumped index, or one of another version")
    if zlib.crc32(view[_FRAME.size :]) != crc:
        raise IndexDamaged("checksum differs")
    found = _HEAD.unpack_from(view, _FRAME.size)
    wanted = (kind.encode().ljust(16, b"\0"), metric.encode().ljust(8, b"\0"), rows, dim, parts)
    if found != wanted:
        raise IndexDamaged(f"holds {_described(found)}, wanted {_described(wanted)}")
    found_parts = []
    for length in struct.unpack_from(f"<{parts}Q", view, _FRAME.size + _HEAD.size):
        found_parts.append(view[start : start + length])
        start += length
    if start != len(view):
        raise IndexDamaged(f"{len(view)} bytes, the parts make {start}")
    return found_parts


def _described(head: tuple[bytes, bytes, int, int, int]) -> str:
    kind, metric, rows, dim, parts = head
    names = " ".join(name.rstrip(b"\0").decode("ascii", "replace") for name in (kind, metric))
    return f"{names} of {rows} x {dim} in {parts} parts"
