"""The network seam: what carries frames between the nodes of a cluster, and the frames' bytes.

A frame is a CBOR header, a map with text keys at its top, and raw blobs, which nothing on the way copies or looks into:

    prefix (24 bytes, little-endian)
      kind u8 | version u8 | reserved u16 = 0 | head bytes u32 | body bytes u32
      head CRC u32 | body CRC u32 | CRC u32 of the 20 bytes before
    head    CBOR [header, [bytes of each blob]]; eight opaque bytes in a ping or pong
    body    the blobs, end to end

The prefix has a checksum of its own, so that a damaged length never makes the receiver wait for bytes that will not
come. TCP's sixteen bits miss about one damage in 65,536, and memory, proxies and cards damage data too.

`node/peers.py` is the network over sockets, the simulation has another; `node/calls.py` is what listens.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, Final, NoReturn, Protocol
from zlib import crc32

import cbor2

from node.settings import Address

VERSION: Final = 2
"""Of frames, of the hello, and of the rules by which nodes elect leaders: nodes of different versions refuse each
other."""
HEAD_BYTES_MAX: Final = 1 << 20
BODY_BYTES_MAX: Final = 256 << 20
"""More than the largest request that a node passes on, times what its rows grow by as columns."""
BLOBS_MAX: Final = 1 << 16
DEPTH_MAX: Final = 16
"""Of lists and maps in a header."""
SIGNAL_BYTES: Final = 8
WINDOW_BYTES: Final = 64 << 10
"""Read at once while frames are small."""
SHARED_BYTES: Final = 64 << 10
"""Small blobs next to each other share memory up to about this: keeping one blob pins no more than that of others."""

Blob = bytes | memoryview


class Link(StrEnum):
    """The connections between two nodes: what is large must not stand before what is urgent."""

    SMALL = "small"
    """Consensus and small calls."""
    BULK = "bulk"
    """Chunks, and the rows of forwarded writes and reads."""


class Receiver(Protocol):
    """Who is told what comes in; called on the loop, never from within `send`."""

    def on_session(self, peer: str, up: bool) -> None:
        """The SMALL link to the peer has been proved and is up, or is gone; False comes before the next True."""
        ...

    def on_message(self, peer: str, link: Link, header: dict[str, Any], blobs: Sequence[memoryview]) -> None:
        """A frame has come. The blobs are read-only and may be kept. The header is whatever the peer put there."""
        ...

    def on_bulk_lost(self, peer: str) -> None:
        """The BULK link broke while the session goes on: what was sent on it may not arrive, it comes back by itself.

        Not called when the session ends, which ends both links.
        """
        ...


class Network(Protocol):
    """Carries frames to peers by name.

    Invariants
      1. Per link and session, frames arrive in the order of sending, each at most once, with no gap before one that
         arrives; nothing of an old session arrives after `on_session(peer, True)` of the next.
      2. What is queued for a peer is bounded, whatever the peer does.
    """

    async def start(self, receiver: Receiver) -> None: ...

    async def stop(self) -> None: ...

    def set_peers(self, peers: Mapping[str, Sequence[Address]]) -> None:
        """The other nodes are these from now on, to be found at one of their addresses each.

        May come before `start`. Sessions with others end, those with the named ones go on.
        """
        ...

    def send(self, peer: str, link: Link, header: Mapping[str, Any], blobs: Sequence[Blob] = ()) -> bool:
        """Queue a frame; return False if there is no session or the link's queue is over its limit.

        Never blocks and copies no blob: the caller must not change their bytes afterwards. Raises BadFrame if the
        frame exceeds a limit above, which is a bug or a request that should have been refused before.
        """
        ...

    def is_up(self, peer: str) -> bool:
        """Return whether there is a session, as `on_session` told it."""
        ...

    def queued_bytes(self, peer: str, link: Link) -> int:
        """Return how much is waiting to be sent; 0 when the link is down."""
        ...


class FrameKind(IntEnum):
    MESSAGE = 1
    PING = 2
    PONG = 3


@dataclass(frozen=True, slots=True)
class Frame:
    kind: FrameKind
    header: dict[str, Any]
    blobs: Sequence[memoryview]
    signal: bytes = b""
    """What a ping carries and its pong repeats."""


class Refusal(StrEnum):
    """Why a frame was refused: the label under which it is counted."""

    DAMAGED = "damaged"
    VERSION = "frame_version"
    UNKNOWN_KIND = "unknown_kind"
    TOO_LONG = "too_long"
    MALFORMED = "malformed"


class BadFrame(ValueError):
    """Bytes that are no frame of ours, or what cannot be made one; the stream they came on cannot be trusted."""

    def __init__(self, reason: Refusal, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def encode_message(header: Mapping[str, Any], blobs: Sequence[Blob] = ()) -> list[Blob]:
    """Return the frame in pieces: prefix and head as one, then the blobs themselves. Raises BadFrame over a limit."""
    views: list[Blob] = [blob if type(blob) is bytes else _as_bytes(memoryview(blob)) for blob in blobs]
    lengths = [len(view) for view in views]
    head = _encode_head(header, lengths)
    body_bytes = sum(lengths)
    _check_limits(len(head), body_bytes)
    if len(views) > BLOBS_MAX:
        raise BadFrame(Refusal.TOO_LONG, f"{len(views)} blobs in a frame, the limit is {BLOBS_MAX}")
    body_crc = 0
    for view in views:
        body_crc = crc32(view, body_crc)
    return [_prefix(FrameKind.MESSAGE, head, body_bytes, body_crc) + head, *views]


def _as_bytes(view: memoryview) -> Blob:
    return view.cast("B") if view.nbytes else b""  # Python casts no empty view of several dimensions


def encode_signal(kind: FrameKind, signal: bytes) -> bytes:
    """Return the frame of a ping or pong."""
    assert len(signal) == SIGNAL_BYTES and kind is not FrameKind.MESSAGE
    return _prefix(kind, signal, 0, 0) + signal


class FrameReader:
    """Makes frames of a byte stream that arrives in whatever pieces.

        while True:
            count = read into reader.buffer()
            reader.filled(count)
            while (frame := reader.next_frame()) is not None: ...

    Bytes are received where they stay: each large blob has memory of its own. After BadFrame the reader is done for.
    """

    def __init__(self) -> None:
        self._window = bytearray(WINDOW_BYTES)
        self._view = memoryview(self._window)
        self._begin = self._end = 0
        """What of the window is filled and not yet used; less than a prefix whenever more bytes are wanted."""
        self._target: memoryview | None = None
        """The rest of a head or body piece that is being received in place."""
        self._frames = self._receive_frames()

    def buffer(self) -> memoryview:
        """Return where the next bytes belong; never empty."""
        if self._target is not None:
            return self._target
        if self._begin:
            left = bytes(self._view[self._begin : self._end])
            self._begin, self._end = 0, len(left)
            self._view[: self._end] = left
        return self._view[self._end :]

    def filled(self, count: int) -> None:
        """The first `count` bytes of the buffer have come."""
        if self._target is not None:
            self._target = self._target[count:]
        else:
            self._end += count

    def next_frame(self) -> Frame | None:
        """Return the next whole frame, None if there is none yet. Raises BadFrame."""
        return next(self._frames)

    def _receive_frames(self) -> Generator[Frame | None, None, NoReturn]:
        while True:
            while self._end - self._begin < _PREFIX.size:
                yield None
            prefix = self._view[self._begin : self._begin + _PREFIX.size]
            self._begin += _PREFIX.size
            kind, head_bytes, body_bytes, head_crc, body_crc = _check_prefix(prefix)
            head = yield from self._receive(head_bytes)
            if crc32(head) != head_crc:
                raise BadFrame(Refusal.DAMAGED, "the checksum of a frame's head does not fit")
            if kind is not FrameKind.MESSAGE:
                yield Frame(kind, {}, (), bytes(head))
                continue
            header, lengths = _decode_head(bytes(head), body_bytes)
            blobs: list[memoryview] = []
            crc = 0
            for piece_lengths in _pieces(lengths):
                piece = yield from self._receive(sum(piece_lengths))
                crc = crc32(piece, crc)
                begin = 0
                for length in piece_lengths:
                    blobs.append(piece[begin : begin + length])
                    begin += length
            if crc != body_crc:
                raise BadFrame(Refusal.DAMAGED, "the checksum of a frame's body does not fit")
            yield Frame(kind, header, blobs)

    def _receive(self, count: int) -> Generator[None, None, memoryview]:
        """Return the next `count` bytes of the stream, in memory of their own."""
        piece = memoryview(bytearray(count))
        at_hand = min(count, self._end - self._begin)
        piece[:at_hand] = self._view[self._begin : self._begin + at_hand]
        self._begin += at_hand
        if at_hand < count:
            self._target = piece[at_hand:]
            while self._target:
                yield None
            self._target = None
        return piece.toreadonly()


_PREFIX: Final = struct.Struct("<BBHIIIII")
_UNCHECKED: Final = struct.Struct("<BBHIIII")
_CRC: Final = struct.Struct("<I")


def _prefix(kind: FrameKind, head: bytes, body_bytes: int, body_crc: int) -> bytes:
    unchecked = _UNCHECKED.pack(kind, VERSION, 0, len(head), body_bytes, crc32(head), body_crc)
    return unchecked + _CRC.pack(crc32(unchecked))


def _check_prefix(prefix: memoryview) -> tuple[FrameKind, int, int, int, int]:
    kind, version, reserved, head_bytes, body_bytes, head_crc, body_crc, crc = _PREFIX.unpack(prefix)
    if crc32(prefix[: _UNCHECKED.size]) != crc:
        raise BadFrame(Refusal.DAMAGED, "the checksum of a frame's prefix does not fit")
    if version != VERSION or reserved:
        raise BadFrame(Refusal.VERSION, f"a frame of version {version}, this program speaks {VERSION}")
    if kind not in _KINDS:
        raise BadFrame(Refusal.UNKNOWN_KIND, f"a frame of unknown kind {kind}")
    _check_limits(head_bytes, body_bytes)
    if kind != FrameKind.MESSAGE and (head_bytes != SIGNAL_BYTES or body_bytes):
        raise BadFrame(Refusal.MALFORMED, f"a ping of {head_bytes} and {body_bytes} bytes")
    return _KINDS[kind], head_bytes, body_bytes, head_crc, body_crc


def _check_limits(head_bytes: int, body_bytes: int) -> None:
    if head_bytes > HEAD_BYTES_MAX:
        raise BadFrame(Refusal.TOO_LONG, f"a frame's head has {head_bytes} bytes, the limit is {HEAD_BYTES_MAX}")
    if body_bytes > BODY_BYTES_MAX:
        raise BadFrame(Refusal.TOO_LONG, f"a frame's blobs have {body_bytes} bytes, the limit is {BODY_BYTES_MAX}")


def _encode_head(header: Mapping[str, Any], lengths: list[int]) -> bytes:
    """Return the CBOR of a head. Raises TypeError for what no receiver would take: better here than there."""
    parts: list[bytes] = []
    _encode_item([header, lengths], parts.append, DEPTH_MAX)
    return b"".join(parts)


def _encode_item(value: Any, add: Callable[[bytes], None], depth: int) -> None:
    """Add the item's bytes. Headers are made of few kinds, for which this takes a third of cbor2's time.

    A test holds the two together.
    """
    kind = type(value)
    if kind is int:
        if 0 <= value < 256:
            add(_HEADS[0][value])
        else:
            add(_head(0, value) if value > 0 else _head(1, -1 - value))
    elif kind is str:
        data = value.encode()
        add(_head(3, len(data)))
        add(data)
    elif kind is dict:
        if not depth:
            raise TypeError(f"a frame's header has more than {DEPTH_MAX} levels")
        add(_head(5, len(value)))
        for key, each in value.items():
            _encode_item(key, add, depth - 1)
            _encode_item(each, add, depth - 1)
    elif kind is list or kind is tuple:
        if not depth:
            raise TypeError(f"a frame's header has more than {DEPTH_MAX} levels")
        add(_head(4, len(value)))
        for each in value:
            _encode_item(each, add, depth - 1)
    elif kind is bytes:
        add(_head(2, len(value)))
        add(value)
    elif value is None or kind is bool:
        add(b"\xf6" if value is None else b"\xf5" if value else b"\xf4")
    elif kind is float:
        add(_FLOAT.pack(0xFB, value))
    else:
        _encode_item(_plain(value), add, depth)


def _plain(value: Any) -> Any:
    """Return the plain value in an enum's member, a named tuple, a view. Raises TypeError if there is none."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    raise TypeError(f"a frame's header cannot hold a {type(value).__name__}")


def _head(major: int, number: int) -> bytes:
    """Return the head of a CBOR item."""
    if number < 256:
        return _HEADS[major][number]
    for size, bits in ((25, 16), (26, 32), (27, 64)):
        if number < 1 << bits:
            return bytes((major << 5 | size,)) + number.to_bytes(bits // 8)
    raise TypeError("a frame's header cannot hold a number of more than 64 bits")


def _decode_head(head: bytes, body_bytes: int) -> tuple[dict[str, Any], list[int]]:
    try:
        header, lengths = cbor2.loads(
            head, semantic_decoders=_NO_TAGS, tag_hook=_refuse_tag, max_depth=DEPTH_MAX, allow_indefinite=False,
            allow_duplicate_keys=False,
        )  # fmt: skip
    except (cbor2.CBORDecodeError, ValueError, TypeError, RecursionError, OverflowError, MemoryError) as error:
        raise BadFrame(Refusal.MALFORMED, f"a frame's head is not acceptable CBOR: {type(error).__name__}") from None
    if type(header) is not dict or not all(type(key) is str for key in header):
        raise BadFrame(Refusal.MALFORMED, "a frame's header is not a map with text keys")
    if type(lengths) is not list or not all(type(length) is int and length >= 0 for length in lengths):
        raise BadFrame(Refusal.MALFORMED, "a frame's list of blobs is not a list of lengths")
    if len(lengths) > BLOBS_MAX or sum(lengths) != body_bytes:
        raise BadFrame(Refusal.MALFORMED, f"a frame's {len(lengths)} blobs do not fill its {body_bytes} bytes")
    return header, lengths


def _pieces(lengths: list[int]) -> list[list[int]]:
    """Group neighbouring blobs: what is large stands alone, what is small shares a piece of memory."""
    pieces: list[list[int]] = []
    room = 0
    for length in lengths:
        if not pieces or length > room:
            pieces.append([])
            room = max(SHARED_BYTES, length)
        pieces[-1].append(length)
        room -= length
    return pieces


class _NoTags(dict[int, Callable[..., Any]]):
    """Claims to decode every tag, so that none of the library's own decoders runs, and refuses each."""

    def __missing__(self, tag: int) -> Callable[..., Any]:
        return _refuse_tag


def _refuse_tag(*_: object) -> NoReturn:
    raise ValueError("tags are not accepted")


_NO_TAGS: Final = _NoTags()
_FLOAT: Final = struct.Struct(">Bd")
_HEADS: Final = [
    [bytes((major << 5 | n,)) if n < 24 else bytes((major << 5 | 24, n)) for n in range(256)] for major in range(6)
]
"""Heads of items by major type and number."""
_KINDS: Final = {int(kind): kind for kind in FrameKind}
