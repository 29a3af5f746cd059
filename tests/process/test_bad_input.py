"""What a node does with input that is wrong, on real sockets: an error with a code, nothing changed, others served."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import cbor2
import pytest

from tests.process.running import BASE_PATH, Running

MIB: Final = 1 << 20
BODY_BYTES_MAX: Final = 4 * MIB
DEEP: Final = 100_000
INSERT, QUERY, SEARCH = "/entities/insert", "/entities/query", "/entities/search"
NAN, INFINITY = float("nan"), float("inf")
CBOR: Final = "application/cbor"
JSON: Final = "application/json"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = {"api.body_bytes_max": str(BODY_BYTES_MAX), "api.drain_s_max": "2"}
    with Running(tmp_path_factory.mktemp("bad") / "n1", settings=settings) as node:
        node.ask("/collections/create", collectionName="open", dimension=2)
        fields = [
            {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
            {"fieldName": "v", "dataType": "FloatVector", "elementTypeParams": {"dim": 2}},
            {"fieldName": "small", "dataType": "Int8"},
            {"fieldName": "single", "dataType": "Float"},
            {"fieldName": "double", "dataType": "Double"},
            {"fieldName": "text", "dataType": "VarChar", "elementTypeParams": {"max_length": 8}},
            {"fieldName": "doc", "dataType": "JSON"},
            {"fieldName": "list", "dataType": "Array", "elementDataType": "Int32",
             "elementTypeParams": {"max_capacity": 3}},
            {"fieldName": "flag", "dataType": "Bool"},
        ]  # fmt: skip
        index = [{"fieldName": "v", "metricType": "L2", "indexType": "AUTOINDEX"}]
        node.ask("/collections/create", collectionName="strict", schema={"fields": fields}, indexParams=index)
        node.ask(INSERT, collectionName="open", data=[{"id": key, "vector": [1, 0]} for key in range(100)])
        node.ask(INSERT, collectionName="strict", data=[row()])
        yield node


@pytest.fixture
def node(running: Running) -> Iterator[Running]:
    """The node; afterwards it lives, has the rows that it had, has not grown, and has met nothing unexpected."""
    before_bytes = running.rss_bytes()
    yield running
    assert running.is_alive(), running.said()
    assert (running.count("open"), running.count("strict")) == (100, 1)
    assert running.ask("/collections/list") == ["open", "strict"]
    assert running.rss_bytes() < before_bytes + 100 * MIB
    assert not [one for one in running.events() if one["logger"].startswith("node.api") and one["level"] == "error"]


def row(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "id": 1, "v": [1, 2], "small": 1, "single": 1.5, "double": 2.5, "text": "x", "doc": {"a": 1}, "list": [1],
        "flag": True,
    }  # fmt: skip
    return {**whole, **changes}


def strict(raw: str, **changes: Any) -> bytes:
    """Return an insert of one row in which "@" stands for the raw JSON."""
    return json.dumps({"collectionName": "strict", "data": [row(**changes)]}).replace('"@"', raw).encode()


def nested(count: int, before: str = "[", after: str = "]") -> str:
    return before * count + after * count


JSON_CASES = [
    pytest.param(INSERT, b"", 1801, "format", id="no body"),
    pytest.param(INSERT, b"{{{{", 1801, "JSON", id="no JSON"),
    pytest.param(INSERT, bytes(1000), 1801, "JSON", id="zeros"),
    pytest.param(INSERT, b"[]", 1801, "object", id="a list"),
    pytest.param(INSERT, b'"text"', 1801, "object", id="a text"),
    pytest.param(INSERT, b'{"collectionName":"\xff\xfe"}', 1801, "UTF-8", id="bytes that are no text"),
    pytest.param(INSERT, b'{"collectionName":"\\ud800"}', 1801, "", id="half a surrogate pair"),
    pytest.param(INSERT, nested(DEEP).encode(), 1801, "", id="deep lists"),
    pytest.param(INSERT, b"[" * DEEP, 1801, "", id="deep lists without an end"),
    pytest.param(INSERT, nested(DEEP, '{"a":', "1}").encode(), 1801, "", id="deep objects"),
    *(
        pytest.param(
            QUERY, f'{{"collectionName":"open","{key}":{nested(DEEP)}}}'.encode(), 1801, "nested", id=f"deep {key}"
        )
        for key in ("collectionName", "filter", "exprParams", "outputFields", "nobodyKnowsThis")
    ),
    pytest.param(INSERT, strict(nested(DEEP), doc="@"), 1801, "nested", id="deep JSON value"),
    pytest.param(INSERT, strict("@", v=nested(200)), 1804, "'v'", id="vector as text"),
    pytest.param(INSERT, strict("[NaN, 1]", v="@"), 1801, "JSON", id="NaN"),
    pytest.param(INSERT, strict("[Infinity, 1]", v="@"), 1801, "JSON", id="Infinity"),
    pytest.param(INSERT, strict("[1e999, 1]", v="@"), 1804, "row 0, field 'v'", id="infinite component"),
    pytest.param(INSERT, strict("[1e39, 1]", v="@"), 1804, "row 0, field 'v'", id="component beyond float32"),
    pytest.param(INSERT, strict("1e39", single="@"), 1804, "field 'single'", id="float beyond float32"),
    pytest.param(INSERT, strict("-1e999", double="@"), 1804, "field 'double'", id="infinite double"),
    pytest.param(INSERT, strict('{"a":[1e999]}', doc="@"), 1804, "field 'doc'", id="infinity in a document"),
    pytest.param(INSERT, strict('{"a":18446744073709551616}', doc="@"), 1804, "64 bits", id="2^64 in a document"),
    pytest.param(INSERT, strict('{"a":1,"a":2}', doc="@"), 1804, "duplicate", id="key twice in a document"),
    pytest.param(INSERT, strict("9223372036854775808", id="@"), 1804, "field 'id'", id="id 2^63"),
    pytest.param(INSERT, strict("9" * DEEP, id="@"), 1804, "field 'id'", id="id of 100,000 digits"),
    pytest.param(INSERT, strict("[1]", v="@"), 1804, "dim (1)", id="dimension too small"),
    pytest.param(INSERT, strict("[1,2,3]", v="@"), 1804, "dim (3)", id="dimension too large"),
    pytest.param(INSERT, strict("[]", v="@"), 1804, "dim (0)", id="empty vector"),
    pytest.param(INSERT, strict('["1","2"]', v="@"), 1804, "field 'v'", id="vector of texts"),
    pytest.param(INSERT, strict("null", v="@"), 1804, "field 'v'", id="no vector"),
    pytest.param(INSERT, strict("128", small="@"), 1804, "Int8", id="Int8 128"),
    pytest.param(INSERT, strict("1.5", small="@"), 1804, "Int8", id="Int8 1.5"),
    pytest.param(INSERT, strict('"123456789"', text="@"), 1804, "max length", id="text too long"),
    pytest.param(INSERT, strict("{}", text="@"), 1804, "'text'", id="text as object"),
    pytest.param(INSERT, strict("[1,2,3,4]", list="@"), 1804, "capacity", id="array too long"),
    pytest.param(INSERT, strict("[1,null]", list="@"), 1804, "'list'", id="null in an array"),
    pytest.param(INSERT, strict("[]", flag="@"), 1804, "'flag'", id="Bool as list"),
    pytest.param(INSERT, strict("1", stranger="@"), 1804, "'stranger'", id="unknown field"),
    pytest.param(INSERT, b'{"collectionName":"strict","data":[{"id":2}]}', 1804, "field 'v'", id="fields missing"),
    pytest.param(INSERT, b'{"collectionName":"strict","data":[]}', 1804, "missing", id="no rows"),
    pytest.param(INSERT, b'{"collectionName":"strict","data":[1]}', 1804, "row 0", id="a row that is no object"),
    pytest.param(INSERT, b'{"collectionName":"strict","data":7}', 1801, "data", id="rows that are no list"),
    pytest.param(
        INSERT,
        json.dumps({"collectionName": "open", "data": [{"id": 500, "vector": [1, 0]}] * 9 + [{"id": 501}]}).encode(),
        1804,
        "row 9",
        id="one bad row of ten",
    ),
    pytest.param(
        INSERT, b'{"collectionName":"open","data":[' + b"{}," * DEEP + b"{}]}", 1804, "row 0", id="100,000 empty rows"
    ),
    pytest.param(QUERY, b'{"collectionName":"open","limit":"10"}', 1801, "limit", id="limit as text"),
    pytest.param(QUERY, b'{"collectionName":"open","limit":true}', 1801, "limit", id="limit as bool"),
    pytest.param(QUERY, b'{"collectionName":"open","limit":4294967296}', 1801, "limit", id="limit 2^32"),
    pytest.param(QUERY, b'{"collectionName":"open","limit":16385}', 1100, "16384", id="limit too large"),
    pytest.param(QUERY, b'{"collectionName":"open","offset":-1}', 1100, "offset", id="offset -1"),
    pytest.param(QUERY, b'{"collectionName":"gone"}', 100, "can't find collection", id="no such collection"),
    pytest.param(SEARCH, b'{"collectionName":"open","data":[[1]]}', 1801, "dim", id="query vector of another dim"),
    pytest.param(SEARCH, b'{"collectionName":"open","data":[[1,1e999]]}', 1801, "", id="infinite query vector"),
    pytest.param(SEARCH, b'{"collectionName":"open","data":[]}', 1802, "", id="no query vector"),
    pytest.param(
        SEARCH, b'{"collectionName":"open","data":[' + b"[1,0]," * 16_384 + b"[1,0]]}", 1100, "nq", id="16,385 queries"
    ),
    pytest.param(
        "/collections/create", json.dumps({"collectionName": "n" * 256, "dimension": 2}).encode(), 1100, "256",
        id="name of 256",
    ),
    pytest.param("/collections/create", b'{"collectionName":"x y","dimension":2}', 1100, "Invalid", id="name x y"),
    pytest.param("/collections/create", b'{"collectionName":"x","dimension":1}', 1100, "dim", id="dimension 1"),
    pytest.param("/collections/create", b'{"collectionName":"x","dimension":32769}', 1100, "dim", id="2^15 + 1"),
    pytest.param(
        "/partitions/create", json.dumps({"collectionName": "open", "partitionName": "p" * 256}).encode(), 1100, "256",
        id="partition name of 256",
    ),
    pytest.param(
        "/aliases/create", json.dumps({"collectionName": "open", "aliasName": "a" * 256}).encode(), 1100, "256",
        id="alias of 256",
    ),
    pytest.param("/databases/create", json.dumps({"dbName": "d" * 256}).encode(), 1100, "256", id="database of 256"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "code", "words"), JSON_CASES)
def test_json_that_is_wrong(node: Running, path: str, body: bytes, code: int, words: str) -> None:
    """The code and words that name what is wrong, within a second or two, and a reply of bearable length."""
    expect(node, path, body, code, words)


def expect(node: Running, path: str, body: bytes, code: int, words: str, kind: str = JSON) -> None:
    began_s = time.monotonic()
    status, raw = node.send(path, body, Content_Type=kind, Accept=JSON)
    reply = json.loads(raw)
    assert status == 200 and reply["code"] == code and words in reply["message"], (status, reply)
    assert len(raw) < 4_000
    assert time.monotonic() - began_s < 5


FILTERS = [
    pytest.param("(" * DEEP + "id == 1" + ")" * DEEP, id="brackets"),
    pytest.param("not " * DEEP + "id == 1", id="not"),
    pytest.param("-" * DEEP + "1 == id", id="minus"),
    pytest.param(" and ".join(["id == 1"] * 60_000), id="and"),
    pytest.param(" or ".join(f"x == {i}" for i in range(70_000)), id="1 MB of or"),
    pytest.param("+".join(["id"] * 20_000) + " == 1", id="plus"),
    pytest.param("id in " + "[" * DEEP + "]" * DEEP, id="lists in lists"),
    pytest.param("x" + '["a"]' * 50_000 + " == 1", id="JSON path"),
    pytest.param("@" * MIB, id="1 MB of nonsense"),
    pytest.param("id == " + "9" * MIB, id="1 MB of digits"),
    pytest.param("id == " + "9" * 400 + ".0e400", id="a float beyond all"),
    pytest.param('text =~ "((a{999}){999}){999}"', id="regex that repeats repeats"),
    pytest.param('text like "' + "%a_" * 300_000 + '"', id="1 MB of like"),
]


@pytest.mark.parametrize("expression", FILTERS)
def test_filters_that_are_too_much(node: Running, expression: str) -> None:
    """Filters beyond bounds are refused with a message that does not repeat all of them."""
    for path, more in ((QUERY, {}), (SEARCH, {"data": [[1, 0]]}), ("/entities/delete", {})):
        body = json.dumps({"collectionName": "open", "filter": expression, **more}).encode()
        expect(node, path, body, 1100, "plan: cannot parse expression")


def test_large_filters_that_are_fine(node: Running) -> None:
    """100,000 values in a list, given as text or as template, and a text of 1 MB, are answered."""
    many = list(range(50, 100_050))
    for more in ({"filter": f"id in {many}"}, {"filter": "id in {many}", "exprParams": {"many": many}}):
        found = node.ask(QUERY, collectionName="open", outputFields=["count(*)"], consistencyLevel="Strong", **more)
        assert found == [{"count(*)": 50}]
    assert node.count("open", f"id not in {many}") == 50
    assert node.count("open", f'name == "{"a" * MIB}"') == 0


def test_regexes_take_linear_time(node: Running) -> None:
    """A pattern that makes backtracking engines run for ever is answered."""
    node.ask(QUERY, collectionName="strict", filter='doc["a"] =~ "^(a+)+$"')
    node.ask(QUERY, collectionName="strict", filter='text =~ "^(a|a)*b$"')


def column(**changes: Any) -> dict[str, Any]:
    """Return an insert of one row as columns."""
    whole: dict[str, Any] = {
        "id": struct.pack("<q", 5), "v": struct.pack("<2f", 1, 1), "small": b"\1", "single": struct.pack("<f", 1),
        "double": struct.pack("<d", 1), "text": ["x"], "doc": [{}], "list": [[1]], "flag": b"\1",
    }  # fmt: skip
    return {"collectionName": "strict", "data": {**whole, **changes}}


def one(**changes: Any) -> dict[str, Any]:
    return {"collectionName": "strict", "data": [row(**changes)]}


CBOR_CASES = [
    pytest.param(cbor2.dumps(one(v=[NAN, 1])), 1804, "'v'", id="NaN in a list"),
    pytest.param(cbor2.dumps(one(v=struct.pack("<2f", NAN, 1))), 1804, "'v'", id="NaN in bytes"),
    pytest.param(cbor2.dumps(one(v=struct.pack("<2f", 1, -INFINITY))), 1804, "'v'", id="infinity in bytes"),
    pytest.param(cbor2.dumps(one(v=b"\0" * 7)), 1804, "'v'", id="seven bytes"),
    pytest.param(cbor2.dumps(one(single=INFINITY)), 1804, "'single'", id="infinite Float"),
    pytest.param(cbor2.dumps(one(double=NAN)), 1804, "'double'", id="NaN Double"),
    pytest.param(cbor2.dumps(one(doc={"a": [NAN]})), 1804, "'doc'", id="NaN in a document"),
    pytest.param(cbor2.dumps(one(doc={1: 2})), 1801, "", id="a key that is no text"),
    pytest.param(cbor2.dumps(one(id=1 << 63)), 1804, "'id'", id="id 2^63"),
    pytest.param(cbor2.dumps(one(id=1 << 70)), 1801, "tag", id="a number beyond 64 bits"),
    pytest.param(cbor2.dumps(column(v=struct.pack("<2f", NAN, 1))), 1804, "'v'", id="NaN in a column"),
    pytest.param(cbor2.dumps(column(double=struct.pack("<d", NAN))), 1804, "'double'", id="NaN in a Double column"),
    pytest.param(cbor2.dumps(column(flag=b"\2")), 1804, "'flag'", id="Bool 2"),
    pytest.param(cbor2.dumps(column(id=struct.pack("<2q", 5, 6))), 1804, "rows", id="columns of different lengths"),
    pytest.param(cbor2.dumps(column(text=["x", "y"])), 1804, "'text'", id="a list longer than the columns"),
    pytest.param(cbor2.dumps({}) + b"\0", 1801, "follow", id="bytes behind"),
    pytest.param(b"\x5b" + struct.pack(">Q", 1 << 60), 1801, "CBOR", id="2^60 bytes claimed"),
    pytest.param(b"\x7b" + struct.pack(">Q", 1 << 62), 1801, "CBOR", id="2^62 characters claimed"),
    pytest.param(b"\x9b" + struct.pack(">Q", 1 << 60), 1801, "CBOR", id="2^60 items claimed"),
    pytest.param(b"\x9a" + struct.pack(">I", 1 << 31), 1801, "CBOR", id="2^31 items claimed"),
    pytest.param(b"\xbb" + struct.pack(">Q", 1 << 60), 1801, "CBOR", id="2^60 pairs claimed"),
    pytest.param((b"\x9a" + struct.pack(">I", 1 << 28)) * 90, 1801, "CBOR", id="2^28 items claimed 90 levels deep"),
    pytest.param(b"\x81" * DEEP + b"\0", 1801, "depth", id="deep lists"),
    pytest.param(b"\xa1\x61a" * DEEP + b"\0", 1801, "depth", id="deep maps"),
    pytest.param(b"\xc1" * DEEP + b"\0", 1801, "CBOR", id="deep tags"),
    pytest.param(b"\x9f" * 50 + b"\xff" * 50, 1801, "indefinite", id="lists without length"),
    pytest.param(cbor2.dumps({"collectionName": cbor2.CBORTag(0, "2020-01-01T00:00:00Z")}), 1801, "tag", id="a date"),
    pytest.param(cbor2.dumps(cbor2.CBORTag(35, "(a+)+")), 1801, "tag", id="a regex"),
    pytest.param(bytes.fromhex("d81c81d81d00"), 1801, "tag", id="a list within itself"),
    pytest.param(b"\x62\xff\xfe", 1801, "CBOR", id="text that is no UTF-8"),
    pytest.param(b"\xf7", 1801, "map", id="undefined"),
    pytest.param(b"\xf9\x7e\x00", 1801, "map", id="a bare NaN"),
]


@pytest.mark.parametrize(("body", "code", "words"), CBOR_CASES)
def test_cbor_that_is_wrong(node: Running, body: bytes, code: int, words: str) -> None:
    """Lies about lengths cost nothing; values that JSON could not give are refused."""
    expect(node, INSERT, body, code, words, kind=CBOR)


# --- sockets -----------------------------------------------------------------------------------------------------


def head(path: str, *lines: str) -> bytes:
    text = "".join(f"{line}\r\n" for line in ("Host: n", "Content-Type: application/json", *lines))
    return f"POST {BASE_PATH}{path} HTTP/1.1\r\n{text}\r\n".encode()


def answer(connection: socket.socket) -> bytes:
    """Return what arrives until the node closes the connection or falls silent."""
    connection.settimeout(3)
    data = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while part := connection.recv(1 << 16):
            data += part
            if b"\r\n\r\n" in data and data.endswith(b"}"):
                break
    return data


def hang_up(connection: socket.socket) -> None:
    """Close with a reset, as a client that is killed does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def many_rows(first: int, count: int = 500) -> bytes:
    data = [{"id": key, "vector": [1, 0]} for key in range(first, first + count)]
    return json.dumps({"collectionName": "open", "data": data}).encode()


@pytest.mark.parametrize("chunked", [False, True], ids=["with length", "in chunks"])
def test_a_body_over_the_limit(node: Running, chunked: bool) -> None:
    """It is refused as it arrives, whether or not its length is given, and does not stay in memory."""
    peak_bytes = node.peak_rss_bytes()
    body = many_rows(1_000) + b" " * (5 * BODY_BYTES_MAX)
    with contextlib.closing(node.socket()) as connection:
        connection.sendall(head(INSERT, "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"))
        with contextlib.suppress(OSError):
            for start in range(0, len(body), 1 << 16):
                part = body[start : start + (1 << 16)]
                connection.sendall(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
        said = answer(connection)
    assert b" 413 " in said and b'"code":1102' in said and str(BODY_BYTES_MAX).encode() in said
    assert node.peak_rss_bytes() < peak_bytes + 4 * BODY_BYTES_MAX


def test_a_body_that_grows_when_unpacked(node: Running) -> None:
    """256 MiB packed into one are refused at the limit; what is not gzip at all is said."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    packed = b"".join([packer.compress(bytes(MIB)) for _ in range(256)]) + packer.flush()
    assert len(packed) < 2 * MIB
    peak_bytes = node.peak_rss_bytes()
    status, raw = node.send(INSERT, packed, Content_Encoding="gzip")
    assert status == 413 and json.loads(raw)["code"] == 1102
    assert node.peak_rss_bytes() < peak_bytes + 8 * BODY_BYTES_MAX
    assert json.loads(node.send(INSERT, b"no gzip", Content_Encoding="gzip")[1])["code"] == 1801


def test_clients_that_hang_up_half_way(node: Running) -> None:
    """Half a body changes nothing; half a reply read harms nobody; a whole body is done or not done, never in part."""
    body = many_rows(10_000)
    query = json.dumps({"collectionName": "open", "limit": 100, "outputFields": ["*"]}).encode()
    for end in (socket.socket.close, hang_up):
        for _ in range(20):
            connection = node.socket()
            connection.sendall(head(INSERT, f"Content-Length: {len(body)}") + body[: len(body) // 2])
            end(connection)
            connection = node.socket()
            connection.sendall(head(QUERY, f"Content-Length: {len(query)}") + query)
            connection.recv(64)
            end(connection)
    for i in range(10):
        whole = many_rows(20_000 + 500 * i)
        connection = node.socket()
        connection.sendall(head(INSERT, f"Content-Length: {len(whole)}") + whole)
        (hang_up if i % 2 else socket.socket.close)(connection)
    time.sleep(0.5)
    counts = {node.count("open", f"{20_000 + 500 * i} <= id < {20_500 + 500 * i}") for i in range(10)}
    assert counts <= {0, 500}
    assert node.count("open", "10000 <= id < 20000") == 0
    node.ask("/entities/delete", collectionName="open", filter="id >= 10000")


def test_clients_that_never_finish(node: Running) -> None:
    """Forty slow clients hold nobody else up, and one that promised a body is told when its time is up."""
    slow = [node.socket() for _ in range(40)]
    try:
        for i, connection in enumerate(slow):
            connection.sendall(head(INSERT, "Content-Length: 900") + b"{" if i % 2 else b"POST / HTTP/1.1\r\nX-A: ")
        began_s = time.monotonic()
        for _ in range(20):
            assert node.count("open") == 100
        assert time.monotonic() - began_s < 5
        late = node.socket()
        slow.append(late)
        late.sendall(head(INSERT, "Content-Length: 900", "Request-Timeout: 1") + b"{")
        said = answer(late)
        assert b" 408 " in said and b'"code":10001' in said
    finally:
        for connection in slow:
            connection.close()


GARBAGE = [
    pytest.param(b"\x00\xff" * 5_000, id="bytes"),
    pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), id="TLS"),
    pytest.param(b"GET / HTTP/9.9\r\n\r\n", id="HTTP 9.9"),
    pytest.param(b"GET /" + b"a" * DEEP + b" HTTP/1.1\r\nHost: n\r\n\r\n", id="address of 100,000"),
    pytest.param(b"GET / HTTP/1.1\r\nX: " + b"a" * MIB + b"\r\n\r\n", id="header of 1 MB"),
    pytest.param(b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * DEEP + b"\r\n", id="100,000 headers"),
    pytest.param(head("/collections/list", "Content-Length: -5"), id="length -5"),
    pytest.param(head("/collections/list", "Content-Length: " + "9" * 30), id="length of 30 digits"),
    pytest.param(head(INSERT, "Content-Length: 4", "Transfer-Encoding: chunked") + b"0\r\n\r\n", id="two lengths"),
    pytest.param(head(INSERT, "Transfer-Encoding: chunked") + b"F" * 17 + b"\r\n", id="chunk of 2^68"),
    pytest.param(head(INSERT, "Transfer-Encoding: chunked") + b"zz\r\n", id="chunk of zz"),
    pytest.param(
        head("/collections/list", "Content-Length: 4") + b"null" + b"\x00garbage\r\n\r\n", id="behind a request"
    ),
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_bytes_that_are_no_request(node: Running, garbage: bytes) -> None:
    """They are answered with 400 and the connection is closed."""
    with contextlib.closing(node.socket()) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(garbage)
        assert b" 400 Bad Request\r\n" in answer(connection)


def test_a_thousand_requests_in_one_go(node: Running) -> None:
    """Requests sent without waiting are all answered, in order, the bad ones between them too."""
    good, bad = b'{"collectionName":"open"}', b'{"collectionName":7}'
    requests = [head("/collections/has", f"Content-Length: {len(body)}") + body for body in (good, bad) * 500]
    with contextlib.closing(node.socket()) as connection:
        sender = threading.Thread(target=connection.sendall, args=(b"".join(requests),))
        sender.start()
        data = b""
        connection.settimeout(20)
        while data.count(b"HTTP/1.1 200 OK") < 1_000 or not data.endswith(b"}"):
            part = connection.recv(1 << 16)
            assert part
            data += part
        sender.join()
    codes = [part.split(b",")[0].split(b"}")[0] for part in data.split(b'{"code":')[1:]]
    assert codes == [b"0", b"1801"] * 500


def test_others_are_served_meanwhile(node: Running) -> None:
    """While one client sends the worst of the above over and over, another's searches keep a bearable pace."""
    stop = threading.Event()

    def pest() -> None:
        while not stop.is_set():
            for case in (JSON_CASES[9], JSON_CASES[-7], CBOR_CASES[21], CBOR_CASES[23]):
                values: Any = case.values
                body = next(value for value in values if isinstance(value, bytes))
                node.send(INSERT, body, Content_Type=JSON if case in JSON_CASES else CBOR)
            body = json.dumps({"collectionName": "open", "filter": "not " * 20_000 + "id == 1"}).encode()
            node.send(QUERY, body)

    pests = [threading.Thread(target=pest) for _ in range(2)]
    for thread in pests:
        thread.start()
    try:
        times_s: list[float] = []
        ask: Callable[[], Any] = lambda: node.ask(SEARCH, collectionName="open", data=[[1, 0]], limit=3)  # noqa: E731
        for _ in range(30):
            began_s = time.monotonic()
            assert len(ask()) == 3
            times_s.append(time.monotonic() - began_s)
    finally:
        stop.set()
        for thread in pests:
            thread.join()
    assert sorted(times_s)[15] < 1
