"""Frames: whatever is sent arrives the same, however the stream is cut, and nothing else ever arrives."""

from __future__ import annotations

import struct
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple
from zlib import crc32

import cbor2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.network import (
    BLOBS_MAX,
    BODY_BYTES_MAX,
    DEPTH_MAX,
    HEAD_BYTES_MAX,
    SHARED_BYTES,
    VERSION,
    WINDOW_BYTES,
    BadFrame,
    Blob,
    Frame,
    FrameKind,
    FrameReader,
    Refusal,
    encode_message,
    encode_signal,
)
from storage.types import Tick

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner),
    max_leaves=9,
)
HEADERS = st.dictionaries(st.text(max_size=4), VALUES, max_size=4)
SIZES = st.one_of(
    st.integers(0, 300), st.sampled_from([SHARED_BYTES - 1, SHARED_BYTES, SHARED_BYTES + 1, WINDOW_BYTES * 3 + 5])
)
MESSAGES = st.tuples(HEADERS, st.lists(SIZES, max_size=5))


def joined(pieces: list[Blob]) -> bytes:
    return b"".join(pieces)


def read(stream: bytes, cuts: list[int]) -> list[Frame]:
    """Feed the stream in pieces of those sizes, over and over; return all frames."""
    reader, frames, place, turn = FrameReader(), [], 0, 0
    while place < len(stream):
        buffer = reader.buffer()
        assert len(buffer) > 0
        count = min(cuts[turn % len(cuts)], len(buffer), len(stream) - place)
        buffer[:count] = stream[place : place + count]
        reader.filled(count)
        place, turn = place + count, turn + 1
        while (frame := reader.next_frame()) is not None:
            frames.append(frame)
    return frames


def pattern(size: int, seed: int) -> bytes:
    return (bytes((seed * 37 + i) & 255 for i in range(251)) * (size // 251 + 1))[:size]


@given(st.lists(MESSAGES, max_size=5), st.lists(st.sampled_from([1, 2, 19, 24, 999, 70_000, 1 << 30]), min_size=1))
def test_any_frames_survive_any_cutting(messages: list[tuple[dict[str, Any], list[int]]], cuts: list[int]) -> None:
    """Headers, blobs and their order are the same, whether bytes come one by one or all at once."""
    if sum(map(sum, (sizes for _, sizes in messages))) > 100_000:
        cuts = [max(cut, 999) for cut in cuts]
    sent = [(header, [pattern(size, i) for i, size in enumerate(sizes)]) for header, sizes in messages]
    frames = read(b"".join(joined(encode_message(*one)) for one in sent), cuts)
    assert [(frame.header, [bytes(blob) for blob in frame.blobs]) for frame in frames] == sent
    assert all(frame.kind is FrameKind.MESSAGE for frame in frames)


@given(HEADERS | st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False) | st.binary(max_size=300)))
def test_heads_are_cbor(header: dict[str, Any]) -> None:
    """Our encoder and cbor2 mean the same."""
    (piece,) = encode_message(header)
    assert cbor2.loads(bytes(piece)[24:]) == [header, []]
    edges = {str(n): [n, -n - 1] for bits in (3, 5, 8, 16, 32, 63) for n in ((1 << bits) - 1, 1 << bits)}
    (piece,) = encode_message(edges)
    assert bytes(piece)[24:] == cbor2.dumps([edges, []])


class Colour(StrEnum):
    RED = "red"


class Size(IntEnum):
    LARGE = 3


class Place(NamedTuple):
    x: int


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else 1


def test_headers_hold_plain_values() -> None:
    """Enums, named tuples and views travel as what they are made of; what no receiver would take is not sent."""
    odd = {"a": Colour.RED, "b": Size.LARGE, "c": Place(4), "d": MappingProxyType({1: memoryview(b"x")}), "e": Tick(7)}
    (frame,) = read(joined(encode_message(odd)), [9])
    assert frame.header == {"a": "red", "b": 3, "c": [4], "d": {1: b"x"}, "e": 7}
    (frame,) = read(joined(encode_message({"a": nested(DEPTH_MAX - 2)})), [1 << 20])
    assert frame.header == {"a": nested(DEPTH_MAX - 2)}
    for wrong in ({1}, object(), 1 << 64, -(1 << 64) - 1, 1j, nested(DEPTH_MAX - 1)):
        with pytest.raises(TypeError, match="header"):
            encode_message({"a": wrong})


def test_signals_arrive_between_messages() -> None:
    """A ping and a pong carry their eight bytes."""
    stream = encode_signal(FrameKind.PING, b"12345678") + joined(encode_message({"a": 1})) + encode_signal(
        FrameKind.PONG, b"abcdefgh"
    )  # fmt: skip
    kinds = [(frame.kind, frame.signal) for frame in read(stream, [5])]
    assert kinds == [(FrameKind.PING, b"12345678"), (FrameKind.MESSAGE, b""), (FrameKind.PONG, b"abcdefgh")]


def test_blobs_are_not_copied_on_sending() -> None:
    """The pieces after the first are the blobs themselves, views of anything as bytes."""
    blob, array = b"x" * 99, memoryview(bytearray(16)).cast("d")
    pieces = encode_message({}, [blob, array])  # type: ignore[list-item]
    assert pieces[1] is blob
    assert isinstance(pieces[2], memoryview) and pieces[2].obj is array.obj and pieces[2].nbytes == 16


def test_arrays_are_blobs() -> None:
    """Any contiguous array can be sent, an empty one too."""
    arrays: list[np.ndarray[Any, Any]] = [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.empty((0, 3)),
        np.empty(0, np.int64),
    ]
    (frame,) = read(joined(encode_message({}, [array.data for array in arrays])), [1 << 20])
    assert [bytes(blob) for blob in frame.blobs] == [array.tobytes() for array in arrays]


def test_a_kept_blob_pins_little_else() -> None:
    """A large blob has memory of its own; small ones share it up to SHARED_BYTES; none can be changed."""
    sizes = [10, 20, 300_000, 5, SHARED_BYTES - 1, 30]
    (frame,) = read(joined(encode_message({}, [bytes(size) for size in sizes])), [1 << 30])
    owners = [blob.obj for blob in frame.blobs]
    assert owners[0] is owners[1]
    assert isinstance(owners[2], bytearray) and len(owners[2]) == 300_000
    assert all(isinstance(owner, bytearray) and len(owner) <= max(size, SHARED_BYTES)
               for owner, size in zip(owners, sizes, strict=True))  # fmt: skip
    assert all(blob.readonly for blob in frame.blobs)


@given(st.data())
def test_no_flipped_bit_goes_unnoticed(data: st.DataObject) -> None:
    """Whatever single bit of a frame changes, the frame is refused or still incomplete; it never arrives different."""
    stream = bytearray(joined(encode_message({"g": 4, "h": {"t": 7}}, [b"first", b"second" * 20])))
    bit = data.draw(st.integers(0, len(stream) * 8 - 1))
    stream[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(BadFrame) as caught:
        read(bytes(stream), [1 << 30])
    assert caught.value.reason is Refusal.DAMAGED


def frame_of(
    head: bytes, body: bytes = b"", *, kind: int = 1, version: int = VERSION, reserved: int = 0,
    head_bytes: int | None = None, body_bytes: int | None = None,
) -> bytes:  # fmt: skip
    """Return a frame with whatever in it, and checksums that fit."""
    lengths = len(head) if head_bytes is None else head_bytes, len(body) if body_bytes is None else body_bytes
    unchecked = struct.pack("<BBHIIII", kind, version, reserved, *lengths, crc32(head), crc32(body))
    return unchecked + struct.pack("<I", crc32(unchecked)) + head + body


def head_of(header: Any, lengths: Any = ()) -> bytes:
    return cbor2.dumps([header, list(lengths) if isinstance(lengths, tuple) else lengths])


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", Refusal.DAMAGED, id="http"),
        pytest.param(bytes(24), Refusal.DAMAGED, id="zeros"),
        pytest.param(frame_of(head_of({}), version=VERSION + 1), Refusal.VERSION, id="version"),
        pytest.param(frame_of(head_of({}), reserved=1), Refusal.VERSION, id="reserved"),
        pytest.param(frame_of(head_of({}), kind=9), Refusal.UNKNOWN_KIND, id="kind"),
        pytest.param(frame_of(b"", head_bytes=HEAD_BYTES_MAX + 1), Refusal.TOO_LONG, id="long-head"),
        pytest.param(frame_of(b"", body_bytes=BODY_BYTES_MAX + 1), Refusal.TOO_LONG, id="long-body"),
        pytest.param(frame_of(b"1234567", kind=2), Refusal.MALFORMED, id="short-ping"),
        pytest.param(frame_of(b"12345678", b"x", kind=2), Refusal.MALFORMED, id="ping-with-body"),
        pytest.param(frame_of(b""), Refusal.MALFORMED, id="no-head"),
        pytest.param(frame_of(b"\xff\xff"), Refusal.MALFORMED, id="no-cbor"),
        pytest.param(frame_of(cbor2.dumps({})), Refusal.MALFORMED, id="no-list"),
        pytest.param(frame_of(cbor2.dumps([{}, [], 1])), Refusal.MALFORMED, id="three-parts"),
        pytest.param(frame_of(head_of([])), Refusal.MALFORMED, id="header-no-map"),
        pytest.param(frame_of(head_of({1: 2})), Refusal.MALFORMED, id="header-key-no-text"),
        pytest.param(frame_of(head_of({}, {})), Refusal.MALFORMED, id="lengths-no-list"),
        pytest.param(frame_of(head_of({}, (-1, 2)), b"x"), Refusal.MALFORMED, id="negative-length"),
        pytest.param(frame_of(head_of({}, (True,)), b"x"), Refusal.MALFORMED, id="bool-length"),
        pytest.param(frame_of(head_of({}, (2,)), b"x"), Refusal.MALFORMED, id="lengths-too-much"),
        pytest.param(frame_of(head_of({}), b"x"), Refusal.MALFORMED, id="lengths-too-little"),
        pytest.param(frame_of(head_of({}, (0,) * (BLOBS_MAX + 1))), Refusal.MALFORMED, id="too-many-blobs"),
        pytest.param(frame_of(head_of({"a": {1, 2}})), Refusal.MALFORMED, id="a-set"),
        pytest.param(frame_of(head_of({"a": 1 << 70})), Refusal.MALFORMED, id="a-bignum"),
        pytest.param(frame_of(b"\x82\xa2\x61a\x01\x61a\x02\x80"), Refusal.MALFORMED, id="a-key-twice"),
        pytest.param(frame_of(b"\x9f\xa0\x80\xff"), Refusal.MALFORMED, id="indefinite"),
        pytest.param(frame_of(b"\x82\xa1\x61a" + b"\x81" * 99 + b"\x01\x80"), Refusal.MALFORMED, id="too-deep"),
        pytest.param(frame_of(b"\x82\xa1\x61a\x9b" + b"\x7f" * 8 + b"\x80"), Refusal.MALFORMED, id="huge-list"),
    ],
)
def test_what_is_no_frame_is_refused(stream: bytes, reason: Refusal) -> None:
    """By a reason of its own, before anything of its promised length is allocated."""
    with pytest.raises(BadFrame) as caught:
        read(stream, [1 << 30])
    assert caught.value.reason is reason


@given(st.binary(min_size=24, max_size=300), st.integers(1, 300))
def test_noise_is_never_a_frame(noise: bytes, cut: int) -> None:
    """Random bytes are refused as soon as there are as many as a prefix has."""
    with pytest.raises(BadFrame):
        read(noise, [cut])


@given(st.binary(max_size=80), st.binary(max_size=40))
def test_noise_with_fitting_checksums_is_refused_or_read(head: bytes, body: bytes) -> None:
    """Whatever a peer of another make sends, it is a frame or BadFrame, never another exception."""
    try:
        frames = read(frame_of(head, body), [1 << 30])
    except BadFrame as error:
        assert error.reason is Refusal.MALFORMED
    else:
        assert len(frames) == 1


@pytest.mark.parametrize(
    ("header", "blobs"),
    [
        pytest.param({"a": "x" * HEAD_BYTES_MAX}, [], id="head"),
        pytest.param({}, [b""] * (BLOBS_MAX + 1), id="blobs"),
        pytest.param({}, [memoryview(bytes(1 << 20))] * 257, id="body"),
    ],
)
def test_what_no_peer_would_take_is_not_sent(header: dict[str, Any], blobs: list[Blob]) -> None:
    """The limits hold on both sides."""
    with pytest.raises(BadFrame) as caught:
        encode_message(header, blobs)
    assert caught.value.reason is Refusal.TOO_LONG
