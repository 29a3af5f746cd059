"""gRPC on a client's connection: HTTP/2's streams to requests, answers to frames.

`frames.py` keeps HTTP/2's rules and writes no byte itself; this is the protocol of asyncio around it, on the node's one
loop. A request is decoded, carried out and answered where its bytes arrive, without a thread or another socket in
between. Only calls of one request and one answer are spoken, which is all that Milvus's service is asked for.

What clients may make it hold is bounded: streams at a time, a message, the messages of a connection that have yet to
arrive whole, streams that are begun to be given up, and what is written while nobody reads: then nothing more is read.
"""

from __future__ import annotations

import asyncio
import logging
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol
from urllib.parse import quote

from node.grpc.frames import Began, Came, Event, Fault, GaveUp, Goodbye, Room, Session, Violation, header_block

log = logging.getLogger(__name__)

RESETS_MAX: Final = 1000
"""Streams that a client may give up, beyond those that were answered."""
WHOLE_MESSAGES: Final = 2
"""A connection may have so many of the longest messages on their way at a time."""
HELLO_S_MAX: Final = 30.0
"""From the first byte to the settings of the client."""
IDLE_S: Final = 600.0
"""A connection without a call is closed: clients open another one without noticing."""
PREFIX: Final = struct.Struct(">BI")
"""Before a message: whether it is compressed, and its length."""
ENCODINGS: Final = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
_UNITS_S: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT: Final = re.compile(r"([0-9]{1,8})([HMSmun])", re.ASCII)
_SAFE: Final = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
TEXT_CHARS_MAX: Final = 4_000
"""Of the reason that a refusal gives."""
_HEAD: Final = header_block(
    [
        (":status", "200"),
        ("content-type", "application/grpc"),
        ("grpc-accept-encoding", "identity,deflate,gzip"),
    ]
)
_DONE: Final = header_block([("grpc-status", "0")])
_NOT_GRPC: Final = header_block([(":status", "415")])


class Code(IntEnum):
    """How a call ends that has no answer: some of gRPC's status codes."""

    UNKNOWN = 2
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class Refused(Exception):
    """A call that ends without an answer."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


@dataclass(frozen=True, slots=True)
class Incoming:
    """A request that has arrived whole."""

    path: str
    metadata: Mapping[str, str]
    """By lower-case names; of several values of one name the last."""
    body: bytes
    encoding: str
    """What the body is compressed by, "" if it is not."""
    address: str
    """Where the client is, "" if that is not known."""
    until_s: float | None
    """Monotonic time at which the client waits no longer; None if it said nothing of that."""


class Answering(Protocol):
    """What carries requests out."""

    @property
    def message_bytes_max(self) -> int: ...

    def now_s(self) -> float: ...

    async def answer(self, request: Incoming) -> bytes:
        """Return the answer's message. Raises Refused."""
        ...


class _Stream:
    """One call: what has arrived of its request."""

    __slots__ = ("encoding", "head", "metadata", "path", "pieces", "size", "task", "until_s")

    def __init__(self, path: str, metadata: Mapping[str, str], encoding: str, until_s: float | None) -> None:
        self.path, self.metadata, self.encoding, self.until_s = path, metadata, encoding, until_s
        self.head = b""
        self.pieces: list[bytes] = []
        self.size = 0
        """Bytes of the pieces."""
        self.task: asyncio.Task[None] | None = None

    def take(self, data: bytes) -> None:
        missing = PREFIX.size - len(self.head)
        if missing > 0:
            self.head += data[:missing]
            data = data[missing:]
        self.pieces.append(data)
        self.size += len(data)

    @property
    def announced(self) -> tuple[int, int]:
        """(whether it is compressed, length) of the message; no length is 0 until that has arrived."""
        return PREFIX.unpack(self.head) if len(self.head) == PREFIX.size else (0, 0)


class Http2Connection(asyncio.Protocol):
    """A client's connection, from its first byte on. Give it to the transport by `set_protocol`."""

    def __init__(self, transport: asyncio.Transport, server: Answering, gone: Callable[[], None]) -> None:
        """`gone` is called once, when the connection has ended."""
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._server = server
        self._gone = gone
        peer = transport.get_extra_info("peername")
        self._address = str(peer[0]) if isinstance(peer, tuple) and peer else ""
        self._streams: dict[int, _Stream] = {}
        self._answers: dict[int, memoryview] = {}
        """What is left to send of answers."""
        self._arriving_bytes = 0
        self._resets_left = RESETS_MAX
        self._is_full = self._is_stopping = False
        self._used_s = self._loop.time()
        self._timer = self._loop.call_later(HELLO_S_MAX, self._look)
        self._http = Session()
        self._write()

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """The calls that are being carried out."""
        return [one.task for one in self._streams.values() if one.task is not None]

    def stop(self) -> None:
        """Take no more calls, and tell the client so."""
        if not self._is_stopping and not self._transport.is_closing():
            self._is_stopping = True
            self._http.say_goodbye()
            self._write()

    def close(self) -> None:
        """End it when what is written is sent; calls that are carried out are left."""
        for task in self.tasks:
            task.cancel()
        self._streams.clear()
        self._answers.clear()
        self._write()
        self._transport.close()

    # --- what asyncio says ---------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._http.take(data):
                self._on_event(event)
        except Violation as violation:
            log.info("gRPC connection closed address=%s error=%s", self._address, violation)
            self.close()
        else:
            self._write()

    def pause_writing(self) -> None:
        self._is_full = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._is_full = False
        self._transport.resume_reading()
        self._send_on()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._timer.cancel()
        self.close()
        self._gone()

    def _look(self) -> None:
        """Close a connection that says nothing, or has said nothing for long."""
        idle_s = self._loop.time() - self._used_s
        if not self._http.has_settings:
            self._transport.abort()
        elif not self._streams and idle_s >= IDLE_S:
            self.stop()
            self.close()
        else:
            self._timer = self._loop.call_later(max(1.0, IDLE_S - idle_s), self._look)

    # --- what the client says ------------------------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        match event:
            case Came(stream_id, data, whole):
                stream = self._streams.get(stream_id)
                if stream is not None:  # else it has been refused
                    self._on_data(stream_id, stream, data, whole)
            case Began(stream_id, headers):
                self._on_request(stream_id, dict(headers))
            case GaveUp(stream_id):
                self._on_reset(stream_id)
            case Room():
                self._send_on()
            case Goodbye():
                self.close()

    def _on_request(self, stream_id: int, fields: Mapping[bytes, bytes]) -> None:
        self._used_s = self._loop.time()
        if self._is_stopping:
            self._http.reset(stream_id, Fault.REFUSED_STREAM)
            return
        if fields.get(b":method") != b"POST" or not fields.get(b"content-type", b"").startswith(b"application/grpc"):
            self._http.send_headers(stream_id, _NOT_GRPC, end=True)
            return
        metadata = {_text(name): _text(value) for name, value in fields.items() if name[:1] != b":"}
        timed = _TIMEOUT.fullmatch(metadata.get("grpc-timeout", ""))
        until_s = None if timed is None else self._server.now_s() + int(timed[1]) * _UNITS_S[timed[2]]
        encoding = metadata.get("grpc-encoding", "identity")
        self._streams[stream_id] = _Stream(_text(fields.get(b":path", b"")), metadata, encoding, until_s)

    def _on_data(self, stream_id: int, stream: _Stream, data: bytes, whole: bool) -> None:
        size = stream.size
        stream.take(data)
        self._arriving_bytes += stream.size - size
        length, limit = stream.announced[1], self._server.message_bytes_max
        if length > limit:
            text = f"a message of {length} bytes is too large: at most {limit} are taken"
            self._refuse(stream_id, Code.RESOURCE_EXHAUSTED, text)
        elif self._arriving_bytes > WHOLE_MESSAGES * limit:
            self._refuse(stream_id, Code.RESOURCE_EXHAUSTED, "too many large messages at a time on one connection")
        elif stream.size > length:
            self._refuse(stream_id, Code.UNIMPLEMENTED, "a call has one message")
        elif whole:
            self._on_whole(stream_id, stream)

    def _on_whole(self, stream_id: int, stream: _Stream) -> None:
        is_compressed, length = stream.announced
        if len(stream.head) < PREFIX.size or stream.size != length:
            self._refuse(stream_id, Code.INTERNAL, "the message did not arrive whole")
            return
        if is_compressed and stream.encoding not in ENCODINGS:
            self._refuse(
                stream_id, Code.UNIMPLEMENTED, f"messages compressed by {stream.encoding[:40]} are not understood"
            )
            return
        self._arriving_bytes -= stream.size
        body, stream.size = stream.pieces[0] if len(stream.pieces) == 1 else b"".join(stream.pieces), 0
        stream.pieces = []
        encoding = stream.encoding if is_compressed else ""
        request = Incoming(stream.path, stream.metadata, body, encoding, self._address, stream.until_s)
        stream.task = self._loop.create_task(self._carry_out(stream_id, request))

    def _on_reset(self, stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None and stream.task is not None:
            stream.task.cancel()
        self._forget(stream_id)
        self._resets_left -= 1
        if self._resets_left < 0:
            log.info("gRPC connection closed, it begins calls to give them up address=%s", self._address)
            self._http.say_goodbye(Fault.ENHANCE_YOUR_CALM)
            self.close()

    # --- what it is told -----------------------------------------------------------------------------------------

    async def _carry_out(self, stream_id: int, request: Incoming) -> None:
        try:
            message = await self._server.answer(request)
        except Refused as refused:
            self._refuse(stream_id, refused.code, refused.text)
        except Exception:
            log.exception("gRPC call failed unexpectedly path=%s", request.path[:100])
            self._refuse(stream_id, Code.UNKNOWN, "unexpected error")
        else:
            if stream_id in self._streams:
                self._resets_left = min(self._resets_left + 1, RESETS_MAX)
                self._http.send_headers(stream_id, _HEAD)
                self._answers[stream_id] = memoryview(PREFIX.pack(0, len(message)) + message)
                self._send(stream_id)
        self._write()

    def _refuse(self, stream_id: int, code: Code, text: str) -> None:
        if stream_id not in self._streams:
            return
        reason = quote(text[:TEXT_CHARS_MAX], safe=_SAFE)
        told = header_block([("grpc-status", str(int(code))), ("grpc-message", reason)])
        self._http.send_headers(stream_id, _HEAD + told, end=True)
        self._forget(stream_id)

    def _forget(self, stream_id: int) -> None:
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            self._arriving_bytes -= stream.size
        self._answers.pop(stream_id, None)

    def _send(self, stream_id: int) -> None:
        """Send what may be sent of an answer."""
        left = self._answers[stream_id]
        while left and not self._is_full:
            room = self._http.room(stream_id)
            if not room:
                break
            self._http.send_data(stream_id, bytes(left[:room]))
            left = left[room:]
            if left:
                self._write()
        self._answers[stream_id] = left
        if not left:
            self._http.send_headers(stream_id, _DONE, end=True)
            self._forget(stream_id)

    def _send_on(self) -> None:
        for stream_id in list(self._answers):
            self._send(stream_id)
        self._write()

    def _write(self) -> None:
        data = self._http.to_send()
        if data and not self._transport.is_closing():
            self._transport.write(data)


def _text(field: bytes) -> str:
    return field.decode(errors="replace")


def inflated(body: bytes, encoding: str, bytes_max: int) -> bytes:
    """Return a message that was compressed. Raises Refused if it is damaged, or longer than it may be."""
    decoder = zlib.decompressobj(ENCODINGS[encoding])
    try:
        message = decoder.decompress(body, bytes_max + 1)
    except zlib.error as error:
        raise Refused(Code.INTERNAL, f"the message is not compressed by {encoding}: {error}") from None
    if len(message) > bytes_max:
        raise Refused(Code.RESOURCE_EXHAUSTED, f"a message is too large: at most {bytes_max} bytes are taken")
    if not decoder.eof:
        raise Refused(Code.INTERNAL, "the compressed message did not arrive whole")
    return message
