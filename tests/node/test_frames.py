"""HTTP/2's rules for clients: what is answered, what ends a connection and why, and what it may make the node hold."""

from __future__ import annotations

from random import Random

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, PingAckReceived, ResponseReceived, StreamEnded
from hpack import Encoder

from node.grpc import frames
from node.grpc.frames import Began, Came, Event, Fault, GaveUp, Goodbye, Room, Session, Violation, header_block

HELLO = frames.PREFACE + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
BLOCK = Encoder().encode([(":method", "POST"), (":path", "/a")])


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


def headers(stream_id: int, flags: int = 4, block: bytes = BLOCK) -> bytes:
    return frame(1, flags, stream_id, block)


def data(stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    return frame(0, flags, stream_id, payload)


def number(value: int) -> bytes:
    return value.to_bytes(4, "big")


REQUEST = [(b":method", b"POST"), (b":path", b"/a")]


@pytest.mark.parametrize("cut", [1, 2, 7, 100, 10_000])
def test_a_conversation_however_it_is_cut(cut: int) -> None:
    """Events are the same in whatever pieces the bytes come."""
    said = b"".join(
        (
            HELLO,
            headers(1),
            data(1, b"abc"),
            frame(1, 0, 3, BLOCK[:1]) + frame(9, 0, 3, BLOCK[1:3]) + frame(9, 4, 3, BLOCK[3:]),
            data(1, bytes([2]) + b"def" + bytes(2), flags=0x8 | 1),
            frame(2, 0, 3, bytes(5)),
            frame(77, 1, 3, b"whatever"),
            headers(5, 4 | 1 | 0x20 | 0x8, bytes([1]) + bytes(5) + BLOCK + bytes(1)),
            frame(3, 0, 3, number(8)),
            data(3, b"too late for it"),
            frame(8, 0, 0, number(5)),
            headers(7),
            headers(7, 4 | 1, b""),
            frame(7, 0, 0, bytes(8)),
        )
    )
    session, events = Session(), list[Event]()
    for at in range(0, len(said), cut):
        events += session.take(said[at : at + cut])
    assert events == [
        Room(),
        Began(1, REQUEST),
        Came(1, b"abc", whole=False),
        Began(3, REQUEST),
        Came(1, b"def", whole=True),
        Began(5, REQUEST),
        Came(5, b"", whole=True),
        GaveUp(3),
        Room(),
        Began(7, REQUEST),
        Came(7, b"", whole=True),
        Goodbye(),
    ]


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n", Fault.PROTOCOL_ERROR, id="another protocol"),
        pytest.param(frames.PREFACE + headers(1), Fault.PROTOCOL_ERROR, id="no settings"),
        pytest.param(HELLO + headers(2), Fault.PROTOCOL_ERROR, id="the server's stream"),
        pytest.param(HELLO + headers(0), Fault.PROTOCOL_ERROR, id="headers of no stream"),
        pytest.param(HELLO + data(0, b""), Fault.PROTOCOL_ERROR, id="data of no stream"),
        pytest.param(HELLO + data(1, b""), Fault.PROTOCOL_ERROR, id="data before headers"),
        pytest.param(HELLO + headers(1, 5) + data(1, b"x"), Fault.STREAM_CLOSED, id="data behind the end"),
        pytest.param(HELLO + headers(1) + headers(1), Fault.STREAM_CLOSED, id="headers twice"),
        pytest.param(HELLO + headers(1, 5) + headers(1, 5), Fault.STREAM_CLOSED, id="headers behind the end"),
        pytest.param(HELLO + headers(1) + data(1, b"\x05abc", 8), Fault.PROTOCOL_ERROR, id="more padding than frame"),
        pytest.param(HELLO + headers(1) + data(1, b"", 8), Fault.PROTOCOL_ERROR, id="padding without a length"),
        pytest.param(HELLO + headers(1, 0x24, b"abc"), Fault.FRAME_SIZE_ERROR, id="no priority"),
        pytest.param(HELLO + headers(1, 0) + data(1, b""), Fault.PROTOCOL_ERROR, id="interrupted headers"),
        pytest.param(HELLO + headers(1, 0) + frame(9, 4, 3), Fault.PROTOCOL_ERROR, id="continued elsewhere"),
        pytest.param(HELLO + frame(9, 4, 1), Fault.PROTOCOL_ERROR, id="continuation of nothing"),
        pytest.param(HELLO + headers(1, 0) + 16 * frame(9, 0, 1), Fault.ENHANCE_YOUR_CALM, id="endless headers"),
        pytest.param(HELLO + headers(1, 0, bytes(65_536)) + frame(9, 0, 1, b"x"), Fault.ENHANCE_YOUR_CALM, id="long"),
        pytest.param(HELLO + headers(1, 4, bytes(65_537)), Fault.ENHANCE_YOUR_CALM, id="long in one frame"),
        pytest.param(HELLO + headers(1, 4, b"\xff\xff\xff"), Fault.COMPRESSION_ERROR, id="damaged headers"),
        pytest.param(
            HELLO + headers(1, 4, b"\x40\x01a\x7f\x81\x1e" + bytes(4000) + 20 * b"\xbe"),
            Fault.COMPRESSION_ERROR,
            id="headers that grow",
        ),
        pytest.param(HELLO + frame(2, 0, 1, b"1234"), Fault.FRAME_SIZE_ERROR, id="short priority"),
        pytest.param(HELLO + frame(3, 0, 1, number(8)), Fault.PROTOCOL_ERROR, id="reset of nothing"),
        pytest.param(HELLO + headers(1) + frame(3, 0, 1, b"1"), Fault.FRAME_SIZE_ERROR, id="short reset"),
        pytest.param(HELLO + frame(4, 0, 0, b"12345"), Fault.FRAME_SIZE_ERROR, id="short settings"),
        pytest.param(HELLO + frame(4, 1, 0, bytes(6)), Fault.FRAME_SIZE_ERROR, id="settings in an answer"),
        pytest.param(HELLO + frame(4, 0, 1), Fault.FRAME_SIZE_ERROR, id="settings of a stream"),
        pytest.param(HELLO + frame(4, 0, 0, b"\0\4" + number(1 << 31)), Fault.FLOW_CONTROL_ERROR, id="wide window"),
        pytest.param(HELLO + frame(4, 0, 0, b"\0\5" + number(100)), Fault.PROTOCOL_ERROR, id="small frames"),
        pytest.param(HELLO + frame(5, 4, 1, number(2)), Fault.PROTOCOL_ERROR, id="a push"),
        pytest.param(HELLO + frame(6, 0, 0, b"1"), Fault.FRAME_SIZE_ERROR, id="short ping"),
        pytest.param(HELLO + frame(8, 0, 0, number(0)), Fault.PROTOCOL_ERROR, id="no room"),
        pytest.param(HELLO + frame(8, 0, 1, number(1)), Fault.PROTOCOL_ERROR, id="room for nothing"),
        pytest.param(HELLO + frame(8, 0, 0, number((1 << 31) - 1)), Fault.FLOW_CONTROL_ERROR, id="too much room"),
        pytest.param(HELLO + frame(8, 0, 0, b"1"), Fault.FRAME_SIZE_ERROR, id="short room"),
        pytest.param(HELLO + b"\xff\xff\xff" + bytes(6), Fault.FRAME_SIZE_ERROR, id="long frame"),
    ],
)
def test_what_ends_a_connection(said: bytes, fault: Fault) -> None:
    """A rule that is broken ends it, and the client is told which."""
    session = Session()
    with pytest.raises(Violation) as broken:
        session.take(said)
    assert broken.value.fault is fault and str(broken.value)
    assert session.to_send().endswith(number(fault))


def test_more_than_the_window_is_refused() -> None:
    """A client that sends beyond what it may ends; what is taken is given back as room."""
    session = Session()
    session.take(HELLO + headers(1))
    session.to_send()
    half = bytes(frames.FRAME_BYTES_MAX)
    for _ in range(3):
        session.take(data(1, half))
    sent = session.to_send()
    more = number(3 * len(half))
    assert sent == frame(8, 0, 0, more) + frame(8, 0, 1, more)
    session.take(data(1, half, 1))
    assert session.to_send() == b""


def test_streams_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, and the others go on."""
    monkeypatch.setattr(frames, "STREAMS_MAX", 2)
    session = Session()
    events = session.take(HELLO + headers(1) + headers(3) + headers(5))
    assert [one.stream_id for one in events if isinstance(one, Began)] == [1, 3]
    assert session.to_send().endswith(frame(3, 0, 5, number(Fault.REFUSED_STREAM)))
    session.send_headers(1, b"", end=True)
    assert [one.stream_id for one in session.take(headers(7)) if isinstance(one, Began)] == [7]


def test_what_is_left_of_a_request_is_not_wanted_once_it_is_answered() -> None:
    session = Session()
    session.take(HELLO + headers(1))
    session.to_send()
    session.send_headers(1, b"x", end=True)
    assert session.to_send() == frame(1, 5, 1, b"x") + frame(3, 0, 1, number(Fault.NO_ERROR))
    assert session.take(data(1, b"still coming", 1)) == [] and session.room(1) == 0


@pytest.mark.parametrize("seed", range(8))
def test_another_implementation_understands_it(seed: int) -> None:
    """h2 as the client: what each says comes to the other as it was, by whatever windows and frames they agree on."""
    random = Random(seed)
    client = H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    client.update_settings({4: random.choice([1000, 65_535, 1 << 20]), 5: random.choice([16_384, 100_000])})
    server = Session()
    bodies = {2 * i + 1: random.randbytes(random.choice([0, 5, 5000, 150_000])) for i in range(6)}
    left, echoed, told = dict(bodies), dict.fromkeys(bodies, b""), dict.fromkeys(bodies, b"")
    ended, pending = set[int](), dict[int, bytes]()
    long = "v" * random.choice([1, 126, 127, 128, 5000])
    for stream_id in bodies:
        first = [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/a")]
        client.send_headers(stream_id, [*first, ("x", "y" * random.randrange(20_000))])
    client.ping(b"12345678")
    pinged = False
    for _ in range(10_000):
        for stream_id in list(left):
            size = min(client.local_flow_control_window(stream_id), client.max_outbound_frame_size, 50_000)
            client.send_data(stream_id, left[stream_id][:size], end_stream=size >= len(left[stream_id]))
            left[stream_id] = left[stream_id][size:]
            if not left[stream_id]:
                del left[stream_id]
        said = client.data_to_send()
        while said:
            cut = random.randint(1, 40_000)
            for event in server.take(said[:cut]):
                if isinstance(event, Came):
                    echoed[event.stream_id] += event.data
                    if event.whole:
                        assert echoed[event.stream_id] == bodies[event.stream_id]
                        server.send_headers(event.stream_id, header_block([(":status", "200"), ("long", long)]))
                        pending[event.stream_id] = bodies[event.stream_id]
            said = said[cut:]
        for stream_id, rest in list(pending.items()):
            room = server.room(stream_id)
            server.send_data(stream_id, rest[:room])
            pending[stream_id] = rest[room:]
            if not pending[stream_id]:
                del pending[stream_id]
                server.send_headers(stream_id, header_block([("done", "1")]), end=True)
        for answer in client.receive_data(server.to_send()):
            if isinstance(answer, DataReceived):
                told[answer.stream_id] += answer.data
                client.acknowledge_received_data(answer.flow_controlled_length, answer.stream_id)
            elif isinstance(answer, ResponseReceived):
                assert dict(answer.headers)[b"long"].decode() == long
            elif isinstance(answer, StreamEnded):
                ended.add(answer.stream_id)
            pinged = pinged or isinstance(answer, PingAckReceived)
        if len(ended) == len(bodies):
            break
    assert told == bodies and pinged
