"""The server's half of HTTP/2 (RFC 9113) as gRPC uses it: bytes in, events out, bytes to send. The door to hpack.

It reads no clock and no socket. Enough of HTTP/2 is here to serve requests: no pushes, no priorities, and answers whose
headers are written without a table, so that most of them are constants. Of requests' headers hpack undoes the
compression. A general library spends more on a small call than its search takes; `tests/node/test_frames.py` holds this
one against h2.

What a client may make it hold is bounded by the constants below. Whoever breaks a rule that concerns the connection
ends it, by `Violation`; frames of a stream that is closed are ignored, since they may have been on their way.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from hpack import Decoder
from hpack.exceptions import HPACKError

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
STREAMS_MAX: Final = 1024
"""Requests of a connection at a time; clients wait with the next."""
FRAME_BYTES_MAX: Final = 1 << 20
"""Of a frame that is taken, where the least that HTTP/2 allows is 16 KiB: each takes time beside that of its bytes."""
WINDOW_BYTES: Final = 4 << 20
"""What a client may send ahead, on a stream and on the connection."""
HEADER_BYTES_MAX: Final = 64 << 10
"""Of a request's headers, compressed and not."""
CONTINUATIONS_MAX: Final = 16
_WINDOW_START: Final = 65_535
_WINDOW_MAX: Final = (1 << 31) - 1
_FRAME_BYTES_MIN: Final = 16_384
_HEAD: Final = struct.Struct(">HBBBI")
_PAIR: Final = struct.Struct(">HI")
_WORD: Final = struct.Struct(">I")
_END_STREAM, _END_HEADERS, _PADDED, _PRIORITY, _ACK = 0x1, 0x4, 0x8, 0x20, 0x1


class Fault(IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class Violation(Exception):
    """The client broke a rule; what is left to send says so, and then the connection ends."""

    def __init__(self, fault: Fault, text: str) -> None:
        super().__init__(text)
        self.fault = fault


class _Type(IntEnum):
    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class _Setting(IntEnum):
    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Began:
    """A request's headers have come."""

    stream_id: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class Came:
    """A piece of a request's body has come, the last if it is `whole`."""

    stream_id: int
    data: bytes
    whole: bool


@dataclass(frozen=True, slots=True)
class GaveUp:
    """The client wants no answer any more: the stream is closed."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class Room:
    """More may be sent."""


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The client begins nothing more."""


Event = Began | Came | GaveUp | Room | Goodbye
_ROOM: Final = Room()
_GOODBYE: Final = Goodbye()


class _Stream:
    """An open stream."""

    __slots__ = ("has_ended", "receive_window", "send_window")

    def __init__(self, send_window: int) -> None:
        self.receive_window = WINDOW_BYTES
        self.send_window = send_window
        self.has_ended = False
        """Whether the request has."""


class Session:
    """One connection."""

    def __init__(self) -> None:
        self.has_settings = False
        """Whether the client has said how it speaks."""
        self.last_id = 0
        """Of the streams that the client has begun."""
        self.frame_bytes_max = _FRAME_BYTES_MIN
        """Of a frame that the client takes."""
        self._streams: dict[int, _Stream] = {}
        self._decoder = Decoder(HEADER_BYTES_MAX)
        self._preface_left = PREFACE
        self._buffer = bytearray()
        self._needed = 0
        """Bytes of the buffer without which there is nothing to do."""
        self._block: tuple[int, int, list[bytes]] | None = None
        """Headers of which more must follow: stream, flags, fragments."""
        self._receive_window = WINDOW_BYTES
        self._send_window = self._first_window = _WINDOW_START
        self._out: list[bytes] = [_GREETING]

    # --- what there is to send -----------------------------------------------------------------------------------

    def to_send(self) -> bytes:
        """Return what has gathered to be sent."""
        if not self._out:
            return b""
        out, self._out = self._out, []
        return out[0] if len(out) == 1 else b"".join(out)

    def send_headers(self, stream_id: int, block: bytes, *, end: bool = False) -> None:
        """Send headers, as `header_block` gives them; `end` closes the stream."""
        self._frame(_Type.HEADERS, _END_HEADERS | (_END_STREAM if end else 0), stream_id, block)
        if end:
            self._close(stream_id)

    def room(self, stream_id: int) -> int:
        """Return how many bytes of data may be sent now, 0 where the stream is closed."""
        stream = self._streams.get(stream_id)
        return 0 if stream is None else max(0, min(stream.send_window, self._send_window, self.frame_bytes_max))

    def send_data(self, stream_id: int, data: bytes) -> None:
        """Send data, no more than there is room for."""
        stream = self._streams[stream_id]
        assert len(data) <= self.room(stream_id), "whoever sends has asked for room"
        stream.send_window -= len(data)
        self._send_window -= len(data)
        self._frame(_Type.DATA, 0, stream_id, data)

    def reset(self, stream_id: int, fault: Fault) -> None:
        """Close a stream, whatever the client still wants to send."""
        self._streams.pop(stream_id, None)
        self._frame(_Type.RST_STREAM, 0, stream_id, _WORD.pack(fault))

    def say_goodbye(self, fault: Fault = Fault.NO_ERROR) -> None:
        """Tell the client that streams after those that it has begun are not served."""
        self._frame(_Type.GOAWAY, 0, 0, _WORD.pack(self.last_id) + _WORD.pack(fault))

    def _close(self, stream_id: int) -> None:
        """Forget a stream that is answered, and let the client send no more if it has not ended."""
        stream = self._streams.pop(stream_id, None)
        if stream is not None and not stream.has_ended:
            self.reset(stream_id, Fault.NO_ERROR)

    def _frame(self, kind: _Type, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._out.append(_HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream_id) + payload)

    # --- what comes ----------------------------------------------------------------------------------------------

    def take(self, data: bytes) -> list[Event]:
        """Return what bytes of the client mean, together with those before. Raises Violation."""
        events: list[Event] = []
        try:
            self._take(data, events)
        except Violation as violation:
            self.say_goodbye(violation.fault)
            raise
        return events

    def _take(self, data: bytes, events: list[Event]) -> None:
        if self._preface_left:
            count = min(len(self._preface_left), len(data))
            if data[:count] != self._preface_left[:count]:
                raise Violation(Fault.PROTOCOL_ERROR, "it does not begin as HTTP/2 does")
            self._preface_left, data = self._preface_left[count:], data[count:]
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._needed:
                return
            data = bytes(self._buffer)
            self._buffer.clear()
        at, end = 0, len(data)
        self._needed = _HEAD.size
        while end - at >= _HEAD.size:
            high, low, kind, flags, stream_id = _HEAD.unpack_from(data, at)
            size = high << 8 | low
            if size > FRAME_BYTES_MAX:
                raise Violation(Fault.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
            start, stop = at + _HEAD.size, at + _HEAD.size + size
            if stop > end:
                self._needed = stop - at
                break
            self._on_frame(kind, flags, stream_id & _WINDOW_MAX, data[start:stop], events)
            at = stop
        if at < end:
            self._buffer += data[at:]

    def _on_frame(self, kind: int, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if self._block is not None and (kind != _Type.CONTINUATION or stream_id != self._block[0]):
            raise Violation(Fault.PROTOCOL_ERROR, "headers are interrupted by another frame")
        if not self.has_settings and kind != _Type.SETTINGS:
            raise Violation(Fault.PROTOCOL_ERROR, "the first frame is none of settings")
        react = _REACTIONS.get(kind)
        if react is not None:  # what is not known is ignored
            react(self, flags, stream_id, payload, events)

    def _on_headers(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        block = _unpadded(flags, payload)
        if flags & _PRIORITY:
            if len(block) < 5:
                raise Violation(Fault.FRAME_SIZE_ERROR, "headers without the priority that they announce")
            block = block[5:]
        if not stream_id & 1:
            raise Violation(Fault.PROTOCOL_ERROR, f"headers on stream {stream_id}, which is not the client's")
        if flags & _END_HEADERS:
            self._on_block(stream_id, flags, block, events)
        else:
            self._block = stream_id, flags, [block]

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if self._block is None:
            raise Violation(Fault.PROTOCOL_ERROR, "a continuation of nothing")
        _, first_flags, fragments = self._block
        fragments.append(payload)
        if len(fragments) > CONTINUATIONS_MAX or sum(map(len, fragments)) > HEADER_BYTES_MAX:
            raise Violation(Fault.ENHANCE_YOUR_CALM, "too long headers")
        if flags & _END_HEADERS:
            self._block = None
            self._on_block(stream_id, first_flags, b"".join(fragments), events)

    def _on_block(self, stream_id: int, flags: int, block: bytes, events: list[Event]) -> None:
        if len(block) > HEADER_BYTES_MAX:
            raise Violation(Fault.ENHANCE_YOUR_CALM, "too long headers")
        try:
            headers = self._decoder.decode(block, raw=True)  # also of streams that are closed: they share the table
        except (HPACKError, IndexError, ValueError) as error:
            raise Violation(Fault.COMPRESSION_ERROR, f"headers can not be decoded: {error}") from None
        has_ended = bool(flags & _END_STREAM)
        if stream_id <= self.last_id:
            stream = self._streams.get(stream_id)
            if stream is None:
                return
            if stream.has_ended or not has_ended:
                raise Violation(Fault.STREAM_CLOSED, f"headers in the middle of stream {stream_id}")
            stream.has_ended = True
            events.append(Came(stream_id, b"", whole=True))
            return
        self.last_id = stream_id
        if len(self._streams) >= STREAMS_MAX:
            self.reset(stream_id, Fault.REFUSED_STREAM)
            return
        stream = self._streams[stream_id] = _Stream(self._first_window)
        stream.has_ended = has_ended
        events.append(Began(stream_id, [(bytes(name), bytes(value)) for name, value in headers]))
        if has_ended:
            events.append(Came(stream_id, b"", whole=True))

    def _on_data(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        size, data = len(payload), _unpadded(flags, payload)
        if not 0 < stream_id <= self.last_id:
            raise Violation(Fault.PROTOCOL_ERROR, f"data on stream {stream_id}, which has not begun")
        self._receive_window = self._taken(0, self._receive_window, size)
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if stream.has_ended:
            raise Violation(Fault.STREAM_CLOSED, f"data behind the end of stream {stream_id}")
        stream.has_ended = bool(flags & _END_STREAM)
        stream.receive_window = self._taken(stream_id, stream.receive_window, size, more=not stream.has_ended)
        events.append(Came(stream_id, data, stream.has_ended))

    def _taken(self, stream_id: int, window: int, size: int, *, more: bool = True) -> int:
        """Return what is left of a window, which is opened again when half of it is used, if more is to come."""
        window -= size
        if window < 0:
            raise Violation(Fault.FLOW_CONTROL_ERROR, f"{-window} bytes more than may be sent on stream {stream_id}")
        if more and window < WINDOW_BYTES // 2:
            self._frame(_Type.WINDOW_UPDATE, 0, stream_id, _WORD.pack(WINDOW_BYTES - window))
            return WINDOW_BYTES
        return window

    def _on_priority(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if stream_id == 0 or len(payload) != 5:
            raise Violation(Fault.FRAME_SIZE_ERROR, "a priority is 5 bytes of a stream")

    def _on_reset(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 4:
            raise Violation(Fault.FRAME_SIZE_ERROR, "a reset has 4 bytes")
        if not 0 < stream_id <= self.last_id:
            raise Violation(Fault.PROTOCOL_ERROR, f"a reset of stream {stream_id}, which has not begun")
        if self._streams.pop(stream_id, None) is not None:
            events.append(GaveUp(stream_id))

    def _on_settings(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        is_answer = bool(flags & _ACK)
        if stream_id != 0 or len(payload) % 6 or (is_answer and payload):
            raise Violation(Fault.FRAME_SIZE_ERROR, "settings are pairs of 6 bytes of the connection")
        self.has_settings = True
        if is_answer:
            return
        for name, value in _PAIR.iter_unpack(payload):
            if name == _Setting.INITIAL_WINDOW_SIZE:
                if value > _WINDOW_MAX:
                    raise Violation(Fault.FLOW_CONTROL_ERROR, f"a window of {value} bytes")
                for stream in self._streams.values():
                    stream.send_window += value - self._first_window
                self._first_window = value
            elif name == _Setting.MAX_FRAME_SIZE:
                if not _FRAME_BYTES_MIN <= value < 1 << 24:
                    raise Violation(Fault.PROTOCOL_ERROR, f"frames of {value} bytes")
                self.frame_bytes_max = min(value, FRAME_BYTES_MAX)
        self._frame(_Type.SETTINGS, _ACK, 0, b"")
        events.append(_ROOM)

    def _on_push(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        raise Violation(Fault.PROTOCOL_ERROR, "clients push nothing")

    def _on_ping(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if stream_id != 0 or len(payload) != 8:
            raise Violation(Fault.FRAME_SIZE_ERROR, "a ping is 8 bytes of the connection")
        if not flags & _ACK:
            self._frame(_Type.PING, _ACK, 0, payload)

    def _on_goaway(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        events.append(_GOODBYE)

    def _on_window(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 4:
            raise Violation(Fault.FRAME_SIZE_ERROR, "more room is 4 bytes")
        more = _WORD.unpack(payload)[0] & _WINDOW_MAX
        if more == 0 or stream_id > self.last_id:
            raise Violation(Fault.PROTOCOL_ERROR, f"{more} bytes of room on stream {stream_id}")
        stream = self._streams.get(stream_id)
        if stream_id == 0:
            self._send_window = window = self._send_window + more
        elif stream is not None:
            stream.send_window = window = stream.send_window + more
        else:
            return
        if window > _WINDOW_MAX:
            raise Violation(Fault.FLOW_CONTROL_ERROR, f"a window of {window} bytes")
        events.append(_ROOM)


_REACTIONS: Final[Mapping[int, Callable[[Session, int, int, bytes, list[Event]], None]]] = {
    _Type.DATA: Session._on_data,
    _Type.HEADERS: Session._on_headers,
    _Type.PRIORITY: Session._on_priority,
    _Type.RST_STREAM: Session._on_reset,
    _Type.SETTINGS: Session._on_settings,
    _Type.PUSH_PROMISE: Session._on_push,
    _Type.PING: Session._on_ping,
    _Type.GOAWAY: Session._on_goaway,
    _Type.WINDOW_UPDATE: Session._on_window,
    _Type.CONTINUATION: Session._on_continuation,
}


def _unpadded(flags: int, payload: bytes) -> bytes:
    """Return a payload of data or headers without the padding around it."""
    if not flags & _PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise Violation(Fault.PROTOCOL_ERROR, "more padding than frame")
    return payload[1 : len(payload) - payload[0]]


def header_block(headers: Sequence[tuple[str, str]]) -> bytes:
    """Return headers as literals that no table remembers: names are lower-case ASCII."""
    return b"".join(b"\x00" + _string(name) + _string(value) for name, value in headers)


def _string(text: str) -> bytes:
    raw = text.encode("ascii")
    size = len(raw)
    if size < 127:
        return bytes([size]) + raw
    head, left = bytearray([127]), size - 127
    while left > 127:
        head.append(left & 127 | 128)
        left >>= 7
    head.append(left)
    return bytes(head) + raw


def _greeting() -> bytes:
    settings = {
        _Setting.MAX_CONCURRENT_STREAMS: STREAMS_MAX,
        _Setting.INITIAL_WINDOW_SIZE: WINDOW_BYTES,
        _Setting.MAX_FRAME_SIZE: FRAME_BYTES_MAX,
        _Setting.MAX_HEADER_LIST_SIZE: HEADER_BYTES_MAX,
    }
    told = b"".join(_PAIR.pack(name, value) for name, value in settings.items())
    room = _WORD.pack(WINDOW_BYTES - _WINDOW_START)
    return b"".join(
        _HEAD.pack(0, len(payload), kind, 0, 0) + payload
        for kind, payload in ((_Type.SETTINGS, told), (_Type.WINDOW_UPDATE, room))
    )


_GREETING: Final = _greeting()
