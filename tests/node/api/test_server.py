"""What every request goes through: bodies, headers, time limits, sizes, ids, and what is not served."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
from dataclasses import replace
from typing import Any

import cbor2
import numpy as np
import pytest

from node.api.routes import BASE, ROUTES
from node.scope import Scope, current
from storage.errors import NoLeader, StorageFault
from storage.types import ShardId, Tick
from tests.node.api.fake import Client, serve

LIST = "/collections/list"


def test_null_is_no_fields_and_nothing_is_an_error() -> None:
    """The body `null` stands for no fields; an empty body is refused in Milvus's words."""

    async def script(client: Client) -> None:
        assert await client.send(LIST, b"null") == (200, {"code": 0, "data": []})
        assert await client.send(LIST, b" null\n") == (200, {"code": 0, "data": []})
        status, reply = await client.send(LIST, b"")
        assert (status, reply["code"]) == (200, 1801)
        assert "however {} is valid" in reply["message"]
        assert "data" not in reply

    serve(script)


BODIES = [
    (b"{", 1801),
    (b"[]", 1801),
    (b'"x"', 1801),
    (b"7", 1801),
    (b'{"collectionName": "c"} x', 1801),
    (b'{"collectionName": "c", "collectionName": "d"}', 1801),
    (b'{"collectionName": "c", "x": 010}', 1801),
    (b'{"collectionName": "c", "x": NaN}', 1801),
    (b'{"collectionName": "\xff"}', 1801),
    (b'\xef\xbb\xbf{"collectionName": "c"}', 1801),
    (b'{"collectionName": "\\ud800"}', 1801),
    (b'{"x":' * 100_000, 1801),
    (b"[" * 100_000, 1801),
    (b'{"collectionName": 7}', 1801),
    (b'{"collectionName": null}', 1802),
    (b'{"collectionName": ""}', 1802),
    (b"{}", 1802),
    (b'{"COLLECTIONNAME": "c"}', 0),
    (b'{"collectionname": "c", "anything": [{}], "primaryField": 1}', 0),
    (b'{"collectionName": "c", "dbName": null}', 0),
]


@pytest.mark.parametrize(("body", "code"), BODIES, ids=[body[:30].decode("latin1") for body, _ in BODIES])
def test_bodies(body: bytes, code: int) -> None:
    """Bodies that are no JSON, no object or of wrong types are 1801; missing fields are 1802; keys ignore case."""

    async def script(client: Client) -> None:
        status, reply = await client.send("/collections/has", body)
        assert (status, reply["code"]) == (200, code), reply
        assert len(json.dumps(reply)) < 1000

    serve(script)


TYPES: list[tuple[str, dict[str, Any], str]] = [
    ("limit", {"limit": "abc"}, "cannot unmarshal string into Go struct field QueryReqV2.limit of type int32"),
    ("limit", {"limit": []}, "cannot unmarshal array into Go struct field QueryReqV2.limit of type int32"),
    ("limit", {"limit": {}}, "cannot unmarshal object"),
    ("limit", {"limit": 1.5}, "cannot unmarshal number 1.5"),
    ("limit", {"limit": 1 << 31}, "cannot unmarshal number 2147483648"),
    ("limit", {"limit": True}, "cannot unmarshal bool"),
    ("filter", {"filter": 1}, "cannot unmarshal number into Go struct field QueryReqV2.filter of type string"),
    ("outputFields", {"outputFields": "id"}, r"of type \[\]string"),
    ("outputFields", {"outputFields": [1]}, "cannot unmarshal number into Go struct field QueryReqV2.outputFields"),
    ("exprParams", {"exprParams": []}, "of type map"),
    ("explain", {"explain": 1}, "cannot unmarshal number into Go struct field QueryReqV2.explain of type bool"),
]


@pytest.mark.parametrize(("field", "more", "words"), TYPES)
def test_a_wrong_type_names_the_field(field: str, more: dict[str, Any], words: str) -> None:
    """Nothing is coerced: the answer is 1801 and names field and type, in JSON and in CBOR alike."""

    async def script(client: Client) -> None:
        body = {"collectionName": "c", "filter": "", **more}
        for reply in (
            await client.post("/entities/query", body),
            await client.post_cbor("/entities/query", body, Accept="application/json"),
        ):
            assert reply["code"] == 1801
            assert f".{field} " in reply["message"]
        assert re.search(words, (await client.post("/entities/query", body))["message"])

    serve(script)


def test_every_route_answers() -> None:
    """Each route of the table answers an empty object with an envelope; the ones not served with 3000 and a reason."""

    async def script(client: Client) -> None:
        for route in ROUTES:
            reply = await client.post(route.full_path, {})
            assert isinstance(reply["code"], int)
            if route.unsupported:
                assert reply["code"] == 3000
                assert reply["message"] == f"unsupported operation, error: {route.unsupported}"
        assert "not implemented" in (await client.post("/jobs/snapshot/export", {}))["message"]

    serve(script)


def test_elsewhere() -> None:
    """Unknown paths and other methods are a plain 404; OPTIONS is answered for browsers anywhere."""

    async def script(client: Client) -> None:
        for method, path in (
            ("POST", "/v2/vectordb/nothing"),
            ("GET", BASE + LIST),
            ("PUT", BASE + LIST),
            ("GET", "/"),
        ):
            async with client.http.request(method, path) as response:
                assert response.status == 404
                assert response.content_type == "text/plain"
        async with client.http.options(BASE + LIST) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == "*"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
        async with client.http.post(BASE + LIST, data=b"{}") as response:
            assert response.headers["Content-Type"] == "application/json; charset=utf-8"
            assert response.headers["X-Content-Type-Options"] == "nosniff"

    serve(script)


def test_request_ids() -> None:
    """The client's id comes back; one is made up where there is none or an unfit one."""

    async def script(client: Client) -> None:
        seen = set()
        for sent in ("my-id", "x" * 129, "caf\u00e9", None, None):
            headers = {"X-Request-Id": sent} if sent else {}
            async with client.http.post(BASE + LIST, data=b"{}", headers=headers) as response:
                seen.add(response.headers["X-Request-Id"])
                assert (response.headers["X-Request-Id"] == sent) == (sent == "my-id")
        assert len(seen) == 5

    serve(script)


def test_databases_by_body_and_header() -> None:
    """The body's dbName wins over the DB-Name header, which wins over `default`."""

    async def script(client: Client) -> None:
        assert (await client.post(LIST, {}))["code"] == 0
        reply = await client.post(LIST, {}, DB_Name="other")
        assert (reply["code"], reply["message"]) == (800, "database not found[database=other]")
        assert (await client.post(LIST, {"dbName": "default"}, DB_Name="other"))["code"] == 0

    serve(script)


def test_time_limits() -> None:
    """A read whose time is up is cancelled and answers 408 and 10001; a bad limit is 1100."""

    async def script(client: Client) -> None:
        await client.post("/collections/create", {"collectionName": "c", "dimension": 2})

        async def stuck() -> None:
            await asyncio.sleep(60)

        client.service.before = stuck
        body = json.dumps({"collectionName": "c", "data": [[1, 2]]}).encode()
        status, reply = await client.send("/entities/search", body, {"Request_Timeout": "1"})
        assert (status, reply) == (408, {"code": 10001, "message": "request timeout"})
        for bad in ("abc", "1.5", "-1", "0", ""):
            reply = await client.post("/entities/search", {}, Request_Timeout=bad)
            assert reply["code"] == 1100
            assert "Request-Timeout parse failed" in reply["message"]
        client.service.before = None
        assert (await client.post(LIST, {}, Request_Timeout="120"))["code"] == 0

    serve(script)


def test_tokens_go_to_the_service_and_come_back() -> None:
    """The headers are the request's scope; what the service notes is in the answer; what is no token is 1100."""

    async def script(client: Client) -> None:
        await client.post("/collections/create", {"collectionName": "c", "dimension": 2})
        scopes: list[Scope] = []

        async def work() -> None:
            scope = current.get()
            assert scope is not None
            scopes.append(replace(scope, seen=dict(scope.seen)))
            scope.noted_read({ShardId(2): Tick(0x30)})

        client.service.before = work
        body = json.dumps({"collectionName": "c", "filter": "", "gracefulTime": 1500}).encode()
        sent = {"Annulus-Session": "1-ff_2-10", "Annulus-Snapshot": "2-9", "Request-Timeout": "100"}
        for headers in (sent, {}):
            async with client.http.post(BASE + "/entities/query", data=body, headers=headers) as response:
                assert (await response.json())["code"] == 0
                session = "1-ff_2-30" if headers else "2-30"
                assert (response.headers["Annulus-Session"], response.headers["Annulus-Snapshot"]) == (session, "2-30")
        given, none = scopes
        assert (given.seen, given.at) == ({ShardId(1): Tick(0xFF), ShardId(2): Tick(0x10)}, {ShardId(2): Tick(9)})
        assert (none.seen, none.at) == ({}, None)
        assert 60 < given.deadline_s - none.deadline_s < 80
        assert [options.staleness_s for options, _, _ in client.service.queried] == [1.5, 1.5]
        client.service.before = None
        async with client.http.post(BASE + "/entities/query", data=body) as response:
            assert "Annulus-Session" not in response.headers
        for name in ("Annulus-Session", "Annulus-Snapshot"):
            reply = await client.post("/entities/query", {"collectionName": "c"}, **{name: "everything"})
            assert reply["code"] == 1100 and f"{name} 'everything' is no token" in reply["message"]
        for bad in (-1, 86_400_001):
            reply = await client.post("/entities/query", {"collectionName": "c", "gracefulTime": bad})
            assert reply["code"] == 1100 and f"gracefulTime [{bad}] is invalid" in reply["message"]
        assert current.get() is None

    serve(script)


def test_a_change_under_a_key_is_made_once() -> None:
    """I-CO-7. A repeat under the key is answered and says so; another request under it, a key that is none, and a key
    where nothing of the catalogue changes are refused."""

    async def script(client: Client) -> None:
        create, other = ({"collectionName": name, "dimension": 2} for name in "cd")

        async def post(path: str, body: Any, key: str) -> tuple[int, str, str]:
            headers = {"Annulus-Idempotency-Key": key}
            async with client.http.post(BASE + path, data=json.dumps(body).encode(), headers=headers) as response:
                reply = await response.json()
                repeated = response.headers.get("Annulus-Idempotency-Repeated", "")
                return reply["code"], reply.get("message", ""), repeated

        assert await post("/collections/create", create, "k") == (0, "", "")
        assert await post("/collections/create", create, "k") == (0, "", "true")
        for path, body in (("/collections/create", other), ("/collections/drop", create)):
            code, text, repeated = await post(path, body, "k")
            assert (code, repeated) == (1100, "") and "used for another request" in text
        for key in ("", "x" * 129):
            code, text, _ = await post("/collections/create", other, key)
            assert code == 1100 and "1 to 128 printable ASCII characters" in text
        for path in ("/entities/query", "/collections/flush", "/collections/list"):
            code, text, _ = await post(path, create, "l")
            assert code == 1100 and f"{path} is none" in text
        assert list(client.service.collections) == [("default", "c")]

    serve(script)


def test_a_change_outlives_its_time_limit() -> None:
    """An insert whose time is up is not cancelled half way, and the client is told so."""

    async def script(client: Client) -> None:
        await client.post("/collections/create", {"collectionName": "c", "dimension": 2})
        go = asyncio.Event()

        async def wait() -> None:
            await go.wait()

        client.service.before = wait
        body = json.dumps({"collectionName": "c", "data": [{"id": 1, "vector": [1, 2]}]}).encode()
        status, reply = await client.send("/entities/insert", body)
        assert (status, reply["code"]) == (408, 10001)
        assert "may still be made" in reply["message"]
        assert client.service.finished == 0
        go.set()
        for _ in range(100):
            await asyncio.sleep(0.01)
        assert client.service.finished == 1

    serve(script, request_timeout_s=0.2)


def test_large_bodies_are_refused_while_they_arrive() -> None:
    """More than the limit is refused by its announced length, by what has come, and by what it unpacks to."""

    async def script(client: Client) -> None:
        big = b'{"x": "' + b"a" * 300_000 + b'"}'
        status, reply = await client.send(LIST, big)
        assert (status, reply["code"]) == (413, 1102)
        assert "at most 200000 bytes" in reply["message"]

        async def endless() -> Any:
            for _ in range(40):
                yield b"a" * 10_000

        async with client.http.post(BASE + LIST, data=endless()) as response:
            assert response.status == 413
        packed = gzip.compress(big)
        status, reply = await client.send(LIST, packed, {"Content-Encoding": "gzip"})
        assert (status, reply["code"]) == (413, 1102)
        assert (await client.send(LIST, gzip.compress(b"{}"), {"Content-Encoding": "gzip"}))[1]["code"] == 0
        assert (await client.post(LIST, {}))["code"] == 0

    serve(script, body_bytes_max=200_000)


def test_clients_that_hang_up() -> None:
    """A client that goes away half way through its body, or before the answer, harms nobody."""

    async def script(client: Client) -> None:
        port = client.http.port
        assert port is not None
        head = b"POST /v2/vectordb/collections/list HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
        for _ in range(5):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head)
            await writer.drain()
            writer.close()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x00\xff not http\r\n\r\n")
        writer.close()
        await asyncio.sleep(0.05)
        assert (await client.post(LIST, {}))["code"] == 0
        async with client.http.get("/metrics") as response:
            assert "annulus_requests_running 0.0" in await response.text()

    serve(script)


def test_crashes_tell_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A fault nobody foresaw is a 500 with the request's id; the log has the rest."""

    async def script(client: Client) -> None:
        await client.post("/collections/create", {"collectionName": "c", "dimension": 2})

        async def burst() -> None:
            raise RuntimeError("secret detail")

        client.service.before = burst
        body = json.dumps({"collectionName": "c", "data": [[1, 2]]}).encode()
        status, reply = await client.send("/entities/search", body, {"X_Request_Id": "abc"})
        assert (status, reply["code"]) == (500, 65535)
        assert "abc" in reply["message"] and "secret" not in reply["message"]

    with caplog.at_level(logging.ERROR):
        serve(script)
    assert "secret detail" in caplog.text


def test_statuses() -> None:
    """Errors are HTTP 200 by default and their own status when asked; what may succeed later says when to try again."""

    async def by_default(client: Client) -> None:
        status, reply = await client.send("/collections/describe", b'{"collectionName": "none"}')
        assert (status, reply["code"]) == (200, 100)
        assert reply["message"] == "can't find collection[database=default][collection=none]"

    async def standard(client: Client) -> None:
        assert (await client.send("/collections/describe", b'{"collectionName": "none"}'))[0] == 400
        await client.post("/collections/create", {"collectionName": "c", "dimension": 2})
        for error, status, code in ((NoLeader("no leader"), 503, 1), (StorageFault("damaged"), 500, 5)):

            async def fail(error: Exception = error) -> None:
                raise error

            client.service.before = fail
            body = b'{"collectionName": "c", "data": [[1, 2]]}'
            async with client.http.post(BASE + "/entities/search", data=body) as response:
                assert response.status == status
                assert (await response.json())["code"] == code
                assert ("Retry-After" in response.headers) == error.retriable

    serve(by_default)
    serve(standard, standard_status=True)


def test_too_many_requests_are_refused() -> None:
    """More running requests than the limit are refused at once, and the rest are served."""

    async def script(client: Client) -> None:
        await client.post("/collections/create", {"collectionName": "c", "dimension": 2})
        go = asyncio.Event()

        async def wait() -> None:
            await go.wait()

        client.service.before = wait
        search = {"collectionName": "c", "data": [[1, 2]]}
        waiting = [asyncio.create_task(client.post("/entities/search", search)) for _ in range(2)]
        await asyncio.sleep(0.1)
        reply = await client.post("/entities/search", search)
        assert reply["code"] == 4
        assert reply["message"].startswith("too many concurrent requests, queue is full")
        go.set()
        assert [one["code"] for one in await asyncio.gather(*waiting)] == [0, 0]

    serve(script, requests_running_max=2)


def test_pages() -> None:
    """Health, readiness, metrics by route and code, and the description are served by GET."""
    reasons = ["recovering"]

    async def script(client: Client) -> None:
        async with client.http.get("/healthz") as response:
            assert response.status == 200
        async with client.http.get("/readyz") as response:
            assert (response.status, (await response.json())["reason"]) == (503, "recovering")
        reasons[0] = ""
        async with client.http.get("/readyz") as response:
            assert response.status == 200
        await client.post(LIST, {})
        await client.post("/collections/describe", {"collectionName": "none"})
        async with client.http.get("/metrics") as response:
            text = await response.text()
        assert 'annulus_request_seconds_count{code="0",route="/collections/list"} 1.0' in text
        assert 'annulus_request_seconds_count{code="100",route="/collections/describe"} 1.0' in text

    serve(script, ready=lambda: reasons[0])


def test_cbor_both_ways() -> None:
    """Content-Type says what the body is, Accept what the answer is; without Accept the answer is of the same form."""

    async def script(client: Client) -> None:
        await client.post_cbor("/collections/create", {"collectionName": "c", "dimension": 2})
        vectors = np.array([[1, 2], [3, 4]], "<f4")
        reply = await client.post_cbor(
            "/entities/insert",
            {"collectionName": "c", "data": {"id": [1, 2], "vector": vectors.tobytes(), "word": ["a", None]}},
        )
        assert reply == {"code": 0, "cost": 0, "data": {"insertCount": 2, "insertIds": [1, 2]}}
        asked = {"collectionName": "c", "limit": 1, "outputFields": ["vector", "word"]}
        expected = {"id": 2, "vector": vectors[1].tobytes(), "distance": 0.0}
        for data in (vectors[1].tobytes(), [vectors[1].tobytes()], [[3.0, 4]], [[3, 4]]):
            reply = await client.post_cbor("/entities/search", asked | {"data": data})
            assert reply["data"] == [expected], reply
        reply = await client.post_cbor("/entities/search", asked | {"data": [[3, 4]]}, Accept="application/json")
        assert reply["data"] == [expected | {"vector": [3.0, 4.0]}]
        reply = await client.post("/entities/search", asked | {"data": [[3, 4]]}, Accept="application/cbor")
        assert reply["data"] == [expected]
        for data in (bytes(7), [bytes(4)], [["a", 1]], 7, b"", np.array([1, np.nan], "<f4").tobytes(), [[1, 2], [3]]):
            assert (await client.post_cbor("/entities/search", asked | {"data": data}))["code"] == 1801
        _, reply = await client.send(LIST, b"\xff", {"Content-Type": "application/cbor"})
        assert reply["code"] == 1801
        _, reply = await client.send(LIST, cbor2.dumps(None), {"Content-Type": "application/cbor"})
        assert reply["data"] == ["c"]

    serve(script)


def test_large_bodies_are_decoded_on_a_worker() -> None:
    """A body of many rows is split and decoded off the loop, in both forms, and is the same as a small one."""

    async def script(client: Client) -> None:
        await client.post("/collections/create", {"collectionName": "c", "dimension": 2})
        rows = [{"id": i, "vector": [i, 0.5], "word": "x" * 50} for i in range(9000)]
        reply = await client.post("/entities/insert", {"collectionName": "c", "data": rows})
        assert (reply["code"], reply["data"]["insertCount"]) == (0, 9000)
        assert client.executor.runs == 2
        reply = await client.post_cbor("/entities/insert", {"collectionName": "c", "data": rows})
        assert (reply["code"], reply["data"]["insertCount"]) == (0, 9000)
        assert client.executor.runs == 4
        first, second = client.service.collections["default", "c"].rows
        assert first.to_bytes() == second.to_bytes()
        bad = [*rows, {"id": 1, "vector": [1], "word": ""}]
        reply = await client.post("/entities/insert", {"collectionName": "c", "data": bad})
        assert (reply["code"], "row 9000" in reply["message"]) == (1804, True)

    serve(script)


def test_a_round_of_healing_is_begun_and_looked_at() -> None:
    """POST begins or joins a round, whatever its body; GET tells how far it is; anything else is no request."""

    async def script(client: Client) -> None:
        for body in (b"", b"{}", b"\xff nonsense"):
            async with client.http.post("/cluster/check", data=body) as response:
                assert (response.status, await response.json()) == (200, {"finding": "running"})
        async with client.http.get("/cluster/check") as response:
            assert (response.status, await response.json()) == (200, {"finding": "clean"})
        async with client.http.delete("/cluster/check") as response:
            assert response.status in (404, 405)

    serve(script)
