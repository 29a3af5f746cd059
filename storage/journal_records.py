"""The journal's bytes: one record format for everything, checked on every read.

    offset  0  u32  crc       CRC-32 of file number, offset in the file, the 36 bytes that follow, and the payload
            4  u32  length    payload bytes
            8  u8   kind      + 3 zero bytes
           12  u32  group
           16  u64  position  (FILE: the stream address, LSN, of the file's first byte)
           24  u64  term      (FILE: the file's number)
           32  u64  durable   LSN below which the whole stream was durable when this record was written
           40  payload, then zeros up to a multiple of 8

Why `durable`: a record that does not verify is either the torn end of a write that nobody was told about, or damage to
something that was promised. If any later record says "durable up to beyond you", it is damage; else it is a torn end.
To ask that question after a bad record, whose length cannot be trusted, records start at multiples of 8, so that
candidates can be found by looking (`durable_beyond`).

Why the place is in the checksum: a block that the disk wrote to the wrong place, or a file copied over another, would
verify otherwise.

Why CRC-32 and not CRC-32C: zlib's runs at some GB/s, releases the GIL and is in the standard library; both find every
burst up to 32 bits, and the difference in detecting longer errors at our record sizes is not worth a dependency.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from struct import Struct
from typing import Final, NamedTuple
from zlib import crc32

import numpy as np

from storage.disk import File

PAYLOAD_BYTES_MAX: Final = (1 << 32) - 64
READ_BYTES: Final = 1 << 20

_CRC = Struct("<I")
_BODY = Struct("<IB3xIQQQ")
_PLACE = Struct("<QQ")
HEADER_BYTES: Final = _CRC.size + _BODY.size
assert HEADER_BYTES == 40


class Kind(IntEnum):
    """What a record says. Zero is no kind, so a run of zeros is never a record."""

    ENTRY = 1  # the payload is the entry at `position`, of `term`
    TRUNCATE = 2  # entries at and above `position` are gone
    TRIM = 3  # entries up to `position`, whose term is `term`, are no longer needed
    RESET = 4  # a snapshot replaced the log: nothing remains, and the next entry is the one after `position`
    HARD_STATE = 5  # current term; the payload names the vote, empty for none
    FORGET = 6  # the group left this node
    FILE = 7  # first record of every file: its place in the stream, and the state of all groups
    MARK = 8  # says nothing but `durable`; the last record of a journal that was closed in peace


class Record(NamedTuple):
    """One verified record."""

    kind: Kind
    group: int
    position: int
    term: int
    durable: int
    offset: int
    payload: bytes

    @property
    def end(self) -> int:
        """Offset of the record that follows."""
        return self.offset + record_bytes(len(self.payload))


def record_bytes(payload_bytes: int) -> int:
    """Return how many bytes a record takes in the file."""
    return (HEADER_BYTES + payload_bytes + 7) & ~7


def encode(
    kind: int, payload: bytes, *, group: int, position: int, term: int, durable: int, file_number: int, offset: int
) -> tuple[bytes, bytes]:
    """Return the bytes before and after `payload`, which itself is not copied."""
    body = _BODY.pack(len(payload), kind, group, position, term, durable)
    padding = bytes(-(HEADER_BYTES + len(payload)) & 7)
    return _CRC.pack(_checksum(body, payload, file_number, offset)) + body, padding


def decode(data: memoryview, *, file_number: int, offset: int) -> Record | None:
    """Return the record at the start of `data`, or None if there is no whole, undamaged one.

    file_number, offset  where `data` was read
    """
    if len(data) < HEADER_BYTES:
        return None
    length, kind, group, position, term, durable = _BODY.unpack_from(data, _CRC.size)
    if HEADER_BYTES + length > len(data) or not 1 <= kind <= Kind.MARK:
        return None
    payload = bytes(data[HEADER_BYTES : HEADER_BYTES + length])
    if _CRC.unpack_from(data)[0] != _checksum(data[_CRC.size : HEADER_BYTES], payload, file_number, offset):
        return None
    return Record(Kind(kind), group, position, term, durable, offset, payload)


def read_record(file: File, *, file_number: int, offset: int, payload_bytes: int) -> Record | None:
    """Return the record at `offset`, read and verified, or None."""
    data = memoryview(file.read_at(offset, HEADER_BYTES + payload_bytes))
    return decode(data, file_number=file_number, offset=offset)


def read_records(file: File, file_number: int) -> Iterator[Record]:
    """Yield the records from the start of the file up to the first place where none verifies."""
    size, offset = file.size(), 0
    window, window_offset = memoryview(b""), 0
    while True:
        at = offset - window_offset
        wanted = HEADER_BYTES
        if at + HEADER_BYTES <= len(window):
            wanted += _BODY.unpack_from(window, at + _CRC.size)[0]
        if at + wanted > len(window):
            if offset + wanted > size:
                return
            window, window_offset = memoryview(file.read_at(offset, max(READ_BYTES, wanted))), offset
            if len(window) < wanted:
                return
            continue
        record = decode(window[at:], file_number=file_number, offset=offset)
        if record is None:
            return
        yield record
        offset = record.end


def durable_beyond(file: File, file_number: int, *, start: int, lsn: int) -> int | None:
    """Return the offset of a record at or after `start` that says the stream was durable beyond `lsn`, or None.

    It looks at every multiple of 8, because the bytes at `start` do not say where the next record begins.
    Cost: reads the rest of the file at once; runs only when something is torn or damaged.
    """
    start = (start + 7) & ~7
    data = file.read_at(start, max(0, file.size() - start))
    if len(data) < HEADER_BYTES:
        return None
    whole = data[: len(data) & ~7]
    shorts, longs = np.frombuffer(whole, "<u4"), np.frombuffer(whole, "<u8")
    places = len(longs) - HEADER_BYTES // 8 + 1
    lengths, kinds, durables = shorts[1::2][:places], shorts[2::2][:places], longs[4:][:places]
    fits = np.arange(places) * 8 + HEADER_BYTES + lengths.astype(np.int64) <= len(data)
    view = memoryview(data)
    for place in np.flatnonzero(fits & (kinds >= 1) & (kinds <= Kind.MARK) & (durables > lsn)).tolist():
        if decode(view[place * 8 :], file_number=file_number, offset=start + place * 8) is not None:
            return int(start + place * 8)
    return None


def _checksum(body: bytes | memoryview, payload: bytes, file_number: int, offset: int) -> int:
    return crc32(payload, crc32(body, crc32(_PLACE.pack(file_number, offset))))
