"""gRPC on a connection: requests whole, answers as fast as the client takes them, and what clients may not do."""

from __future__ import annotations

import asyncio
import gzip
import struct
import zlib
from collections.abc import Awaitable, Callable
from random import Random

import pytest
from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes

from node.grpc import http2
from node.grpc.http2 import Code, Http2Connection, Incoming, Refused, inflated

LIMIT = 1 << 20
HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/s/echo"),
    (":authority", "x"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]


class Echo:
    """Stands for the server: answers with the request's body, what is in `answers`, or when it may."""

    message_bytes_max = LIMIT

    def __init__(self) -> None:
        self.seen: list[Incoming] = []
        self.asked = asyncio.Event()
        self.answers: dict[str, bytes] = {}
        self.may = asyncio.Event()
        self.may.set()
        self.cancelled = asyncio.Event()
        self.gone = asyncio.Event()
        self.connections: list[Http2Connection] = []

    def now_s(self) -> float:
        return 1000.0

    async def answer(self, request: Incoming) -> bytes:
        self.seen.append(request)
        self.asked.set()
        try:
            await self.may.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if request.path == "/s/refused":
            raise Refused(Code.UNAUTHENTICATED, "50 % of it is not allowed: ä")
        return self.answers.get(request.path, request.body)


class Client:
    """A connection to it, with the answers by stream: bytes, status, and how it ended."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.http = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.http.initiate_connection()
        self.data: dict[int, bytes] = {}
        self.told: dict[int, dict[str, str]] = {}
        self.ended: set[int] = set()
        self.reset: dict[int, int] = {}
        self.goodbye: int | None = None
        self.eats = True
        """Whether the client gives room for more when it has taken something."""
        self.flush()

    def flush(self) -> None:
        self.writer.write(self.http.data_to_send())

    def begin(self, *more: tuple[str, str], path: str = "/s/echo") -> int:
        stream_id = self.http.get_next_available_stream_id()
        self.http.send_headers(stream_id, [(k, path if k == ":path" else v) for k, v in HEADERS] + list(more))
        return stream_id

    def ask(self, message: bytes, *more: tuple[str, str], path: str = "/s/echo", flag: int = 0) -> int:
        stream_id = self.begin(*more, path=path)
        self.http.send_data(stream_id, struct.pack(">BI", flag, len(message)) + message, end_stream=True)
        self.flush()
        return stream_id

    async def step(self) -> bool:
        """Take what comes next; return whether there was something."""
        data = await self.reader.read(1 << 16)
        for event in self.http.receive_data(data):
            if isinstance(event, events.ResponseReceived | events.TrailersReceived):
                self.told.setdefault(event.stream_id, {}).update((str(k), str(v)) for k, v in event.headers)
            elif isinstance(event, events.DataReceived):
                self.data[event.stream_id] = self.data.get(event.stream_id, b"") + event.data
                if self.eats:
                    self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, events.StreamEnded):
                self.ended.add(event.stream_id)
            elif isinstance(event, events.StreamReset):
                self.reset[event.stream_id] = event.error_code
            elif isinstance(event, events.ConnectionTerminated):
                self.goodbye = event.error_code
        self.flush()
        return bool(data)

    async def answered(self, stream_id: int) -> tuple[str, bytes]:
        """Return the status of a call and the message that it was answered with."""
        while stream_id not in self.ended and await self.step():
            pass
        data = self.data.get(stream_id, b"")
        if data:
            assert struct.unpack(">BI", data[:5]) == (0, len(data) - 5)
        return self.told[stream_id].get("grpc-status", ""), data[5:]


def run(script: Callable[[Echo, Client], Awaitable[None]]) -> Echo:
    async def main() -> Echo:
        echo = Echo()

        class Door(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                assert isinstance(transport, asyncio.Transport)

                def gone() -> None:
                    assert not echo.gone.is_set()
                    echo.gone.set()

                echo.connections.append(Http2Connection(transport, echo, gone))
                transport.set_protocol(echo.connections[-1])

        door = await asyncio.get_running_loop().create_server(Door, "127.0.0.1", 0)
        port = door.sockets[0].getsockname()[1]
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        try:
            await asyncio.wait_for(script(echo, client), 60)
        finally:
            client.writer.close()
            await asyncio.wait_for(echo.gone.wait(), 20)
            door.close()
        await asyncio.sleep(0)
        return echo

    return asyncio.run(main())


def test_requests_are_told_whole_and_answered() -> None:
    """A request has path, metadata, client and deadline; many at a time are answered each by its own."""

    async def script(echo: Echo, client: Client) -> None:
        first = client.ask(b"abc", ("dbname", "d"), ("grpc-timeout", "1500m"), path="/s/first")
        others = [client.ask(b"%d" % i * 1000) for i in range(20)]
        assert await client.answered(first) == ("0", b"abc")
        for i, one in enumerate(others):
            assert await client.answered(one) == ("0", b"%d" % i * 1000)
        assert client.told[first][":status"] == "200"
        assert client.told[first]["content-type"] == "application/grpc"
        assert await client.answered(client.ask(b"")) == ("0", b"")

    seen = run(script).seen[0]
    assert (seen.path, seen.body, seen.encoding, seen.address) == ("/s/first", b"abc", "", "127.0.0.1")
    assert seen.metadata["dbname"] == "d" and seen.until_s == 1001.5


def test_a_long_answer_comes_as_the_client_takes_it() -> None:
    """No more is sent than there is room for, of the stream and of the connection; other calls go on meanwhile."""

    async def script(echo: Echo, client: Client) -> None:
        long = Random(1).randbytes(3 << 20)
        echo.answers["/s/long"] = long
        client.eats = False
        stream_id = client.ask(b"", path="/s/long")
        while len(client.data.get(stream_id, b"")) < 65_535:
            await client.step()
        other = client.ask(b"", path="/s/refused")
        assert (await client.answered(other))[0] == "16"
        assert len(client.data[stream_id]) == 65_535 and stream_id not in client.ended
        client.eats = True
        client.http.acknowledge_received_data(65_535, stream_id)
        client.flush()
        assert await client.answered(stream_id) == ("0", long)

    run(script)


def test_a_long_request_arrives_whole() -> None:
    """A message of the greatest length comes through, in frames of any size, padded or not, however it is cut."""

    async def script(echo: Echo, client: Client) -> None:
        message = Random(2).randbytes(LIMIT)
        whole = struct.pack(">BI", 0, len(message)) + message
        for pieces in (4096, 1, 65_000):
            stream_id, left = client.begin(), whole if pieces > 1 else whole[:5] + bytes(20)
            if pieces == 1:
                left = struct.pack(">BI", 0, 20) + bytes(20)
            while left:
                room = min(
                    client.http.local_flow_control_window(stream_id) - 10, client.http.max_outbound_frame_size - 10
                )
                if room <= 0:
                    client.flush()
                    await client.step()
                    continue
                size = min(room, pieces)
                client.http.send_data(stream_id, left[:size], pad_length=5 if pieces == 4096 else None)
                left = left[size:]
            client.http.end_stream(stream_id)
            client.flush()
            assert await client.answered(stream_id) == ("0", bytes(20) if pieces == 1 else message)

    run(script)


def test_what_is_refused_and_how() -> None:
    """Statuses with texts; and the connection goes on after each."""

    async def script(echo: Echo, client: Client) -> None:
        refused = client.ask(b"", path="/s/refused")
        assert await client.answered(refused) == ("16", b"")
        assert client.told[refused]["grpc-message"] == "50 %25 of it is not allowed: %C3%A4"
        large = client.begin()
        client.http.send_data(large, struct.pack(">BI", 0, LIMIT + 1) + bytes(1000))
        client.flush()
        assert (await client.answered(large))[0] == str(int(Code.RESOURCE_EXHAUSTED))
        for body, code in (
            (b"", Code.INTERNAL),
            (b"\0\0\0", Code.INTERNAL),
            (b"\0\0\0\0\5abc", Code.INTERNAL),
            (b"\0\0\0\0\1abc", Code.UNIMPLEMENTED),
        ):
            stream_id = client.begin()
            client.http.send_data(stream_id, body, end_stream=True)
            client.flush()
            assert (await client.answered(stream_id))[0] == str(int(code)), body
        unknown = client.ask(b"abc", ("grpc-encoding", "snappy"), flag=1)
        assert (await client.answered(unknown))[0] == str(int(Code.UNIMPLEMENTED))
        assert client.told[unknown]["grpc-accept-encoding"] == "identity,deflate,gzip"
        plain = client.http.get_next_available_stream_id()
        client.http.send_headers(plain, [*HEADERS[:4], ("content-type", "text/plain")], end_stream=True)
        client.flush()
        await client.answered(plain)
        assert client.told[plain][":status"] == "415"
        assert await client.answered(client.ask(b"still here")) == ("0", b"still here")

    assert [one.path for one in run(script).seen] == ["/s/refused", "/s/echo"]


def test_many_large_messages_at_a_time_are_refused() -> None:
    """What a connection has begun to send is bounded as a whole."""

    async def script(echo: Echo, client: Client) -> None:
        begun = []
        for _ in range(http2.WHOLE_MESSAGES + 1):
            stream_id, left = client.begin(), LIMIT
            begun.append(stream_id)
            client.http.send_data(stream_id, struct.pack(">BI", 0, LIMIT))
            while left > 1000 and stream_id not in client.reset:
                room = min(client.http.local_flow_control_window(stream_id), client.http.max_outbound_frame_size, left)
                if room > 0:
                    client.http.send_data(stream_id, bytes(room - 1 if room == left else room))
                    left -= room
                client.flush()
                if room <= 0:
                    await client.step()
        assert (await client.answered(begun[-1]))[0] == str(int(Code.RESOURCE_EXHAUSTED))

    run(script)


def test_a_client_that_gives_up_ends_its_call() -> None:
    """By a reset, and by hanging up."""

    async def reset(echo: Echo, client: Client) -> None:
        echo.may.clear()
        stream_id = client.ask(b"")
        await echo.asked.wait()
        client.http.reset_stream(stream_id, ErrorCodes.CANCEL)
        client.flush()
        await echo.cancelled.wait()
        echo.may.set()
        assert await client.answered(client.ask(b"next")) == ("0", b"next")

    async def leave(echo: Echo, client: Client) -> None:
        echo.may.clear()
        client.ask(b"")
        await echo.asked.wait()
        client.writer.close()
        await echo.cancelled.wait()

    run(reset)
    run(leave)


def test_calls_that_are_begun_to_be_given_up_end_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an attack would do it; whoever also waits for answers may give up as many."""
    monkeypatch.setattr(http2, "RESETS_MAX", 50)

    async def script(echo: Echo, client: Client) -> None:
        for _ in range(50):
            client.http.reset_stream(client.begin(), ErrorCodes.CANCEL)
            assert (await client.answered(client.ask(b"x")))[0] == "0"
        for _ in range(60):
            client.http.reset_stream(client.begin(), ErrorCodes.CANCEL)
        client.flush()
        while await client.step():
            pass
        assert client.goodbye == ErrorCodes.ENHANCE_YOUR_CALM

    run(script)


def test_a_stop_lets_calls_finish() -> None:
    """Who stops says so, takes no new call, and answers what it has begun."""

    async def script(echo: Echo, client: Client) -> None:
        echo.may.clear()
        client.ask(b"running")
        await echo.asked.wait()
        (connection,) = echo.connections
        connection.stop()
        client.ask(b"too late")
        for _ in range(100):
            await asyncio.sleep(0.001)
        echo.may.set()
        await asyncio.gather(*connection.tasks)
        connection.close()
        raw = await client.reader.read()  # h2's client takes nothing more after the goodbye
        assert b"running" in raw and b"too late" not in raw

    assert [one.body for one in run(script).seen] == [b"running"]


@pytest.mark.parametrize("seed", range(30))
def test_noise_ends_a_connection_and_nothing_else(seed: int) -> None:
    """Bytes of a conversation that are changed, cut, doubled or made up raise nothing."""
    random = Random(seed)
    sound = H2Connection(H2Configuration(client_side=True))
    sound.initiate_connection()
    for i in range(5):
        sound.send_headers(2 * i + 1, HEADERS)
        sound.send_data(2 * i + 1, struct.pack(">BI", 0, 100) + bytes(100), end_stream=True)
    sound.ping(b"12345678")
    said = bytearray(sound.data_to_send())
    for _ in range(random.randint(1, 20)):
        at = random.randrange(24, len(said))
        match random.randrange(3):
            case 0:
                said[at] = random.randrange(256)
            case 1:
                del said[at : at + random.randint(1, 30)]
            case _:
                said[at:at] = said[at : at + random.randint(1, 30)]

    async def script(echo: Echo, client: Client) -> None:
        client.writer.write(b"")
        reader, writer = await asyncio.open_connection(*client.writer.get_extra_info("peername"))
        writer.write(bytes(said))
        writer.write_eof()
        await reader.read()
        writer.close()
        assert await client.answered(client.ask(b"another")) == ("0", b"another")

    run(script)


def test_compressed_messages() -> None:
    """They are what they were, or refused: damaged, cut, or longer than a message may be."""
    text = b"text" * 1000
    assert inflated(gzip.compress(text), "gzip", LIMIT) == text
    assert inflated(zlib.compress(text), "deflate", LIMIT) == text
    for body, code in (
        (b"nonsense", Code.INTERNAL),
        (gzip.compress(text)[:-9], Code.INTERNAL),
        (gzip.compress(bytes(LIMIT + 1)), Code.RESOURCE_EXHAUSTED),
    ):
        with pytest.raises(Refused) as refused:
            inflated(body, "gzip", LIMIT)
        assert refused.value.code is code
