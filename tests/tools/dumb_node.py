"""A node in 200 lines that keeps its promises, or breaks one: what the tools are tested against.

    python -m tests.tools.dumb_node serve --data DIR --listen HOST:PORT
    python -m tests.tools.dumb_node check DIR

State is a dict, durable by one JSON line per change. FAKE_FAULT names the promise to break: see `FAULTS`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zlib
from typing import Any

import cbor2
import numpy as np
import orjson
from aiohttp import web

FAULTS = {
    "late": "acknowledges before it writes, so kill -9 loses acknowledged rows",
    "halves": "writes the two halves of an insert in two steps",
    "revives": "forgets deletes at restart",
    "doubles": "stores the rows of every fifth insert twice",
    "alters": "changes a value at restart",
    "old": "searches show the version before the last upsert",
    "unclean": "check always complains",
    "stubborn": "ends with 3 at SIGTERM",
}
CHECKSUM_CHARS = 8
HELD_BACK = 40
"""Changes that the fault `late` keeps in memory."""


class Store:
    """Collections in memory, and the file that brings them back."""

    def __init__(self, folder: str, fault: str) -> None:
        os.makedirs(folder, exist_ok=True)
        self.fault = fault
        self.collections: dict[str, dict[str, Any]] = {}
        self.inserts = 0
        path = os.path.join(folder, "log.jsonl")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                for line in file:
                    if line.endswith("\n"):
                        self._replay(json.loads(line[CHECKSUM_CHARS:]))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  open as long as the process
        self._held: list[str] = []

    def change(self, *parts: dict[str, Any]) -> None:
        """Apply and write changes."""
        for part in parts:
            self.apply(part)
            self._held.append(checksum(json.dumps(part)) + json.dumps(part) + "\n")
            if self.fault != "late" or len(self._held) > HELD_BACK:
                self._file.write("".join(self._held))
                self._file.flush()
                self._held = []

    def apply(self, part: dict[str, Any]) -> None:
        name = part["name"]
        match part["op"]:
            case "create":
                self.collections[name] = {
                    "pk": part["pk"],
                    "auto": part["auto"],
                    "indexed": True,
                    "rows": [],
                    "old": {},
                }
            case "drop":
                self.collections.pop(name, None)
            case "index":
                self.collections[name]["indexed"] = part["there"]
            case "put":
                self.inserts += 1
                kept = self.collections[name]
                keys = {row[kept["pk"]] for row in part["rows"]} if part["upsert"] else set()
                kept["old"] |= {row[kept["pk"]]: row for row in kept["rows"] if row[kept["pk"]] in keys}
                kept["rows"] = [row for row in kept["rows"] if row[kept["pk"]] not in keys] + part["rows"]
            case "delete":
                kept = self.collections[name]
                gone = set(part["keys"])
                kept["rows"] = [row for row in kept["rows"] if row[kept["pk"]] not in gone]

    def _replay(self, part: dict[str, Any]) -> None:
        if self.fault == "revives" and part["op"] == "delete":
            return
        if self.fault == "alters" and part["op"] == "put":
            part["rows"] = [{**row, "number": -1.0} if row.get("flag") else row for row in part["rows"]]
        self.apply(part)


def checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def sound(folder: str) -> bool:
    """Return whether every whole line of the log carries its own checksum."""
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.endswith("\n")]
    return all(line[:CHECKSUM_CHARS] == checksum(line[CHECKSUM_CHARS:-1]) for line in lines)


def passes(text: str, row: dict[str, Any]) -> bool:
    """Return whether a row passes one of the filters that the tools use."""
    if not text.strip():
        return True
    if found := re.fullmatch(r"(\w+) in \[(.*)\]", text):
        return row[found[1]] in json.loads(f"[{found[2]}]")
    if found := re.fullmatch(r"(\w+) (<|>=|==) (.+)", text):
        value, bound = row[found[1]], json.loads(found[3])
        return bool({"<": value < bound, ">=": value >= bound, "==": value == bound}[found[2]])
    raise ValueError(f"filter {text!r} is beyond a fake")


class Handlers:
    """The routes, as far as the tools go them."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def post(self, request: web.Request) -> web.Response:
        packed = request.content_type == "application/cbor"
        raw = await request.read()
        body = cbor2.loads(raw) if packed else orjson.loads(raw)
        method = getattr(self, request.path.removeprefix("/v2/vectordb/").replace("/", "_"))
        name = body.get("collectionName")
        known = name in self.store.collections or request.path.endswith(("/create", "/drop", "/list", "_state"))
        try:
            missing = {"code": 100, "message": f"can't find collection[collection={name}]"}
            reply = {"code": 0, "data": await method(body)} if known else missing
        except ValueError as error:
            reply = {"code": 1100, "message": str(error)}
        if packed:
            return web.Response(body=cbor2.dumps(reply), content_type="application/cbor")
        return web.Response(body=orjson.dumps(reply), content_type="application/json")

    async def collections_create(self, body: dict[str, Any]) -> Any:
        schema = body.get("schema", {})
        pk = next((field["fieldName"] for field in schema.get("fields", []) if field.get("isPrimary")), "id")
        if body["collectionName"] not in self.store.collections:
            change = {"op": "create", "name": body["collectionName"], "pk": pk, "auto": schema.get("autoID", False)}
            self.store.change(change)
        return {}

    async def collections_drop(self, body: dict[str, Any]) -> Any:
        self.store.change({"op": "drop", "name": body["collectionName"]})
        return {}

    async def collections_list(self, body: dict[str, Any]) -> Any:
        return list(self.store.collections)

    async def collections_flush(self, body: dict[str, Any]) -> Any:
        return {}

    collections_load = collections_release = collections_flush

    async def collections_compact(self, body: dict[str, Any]) -> Any:
        return {"compactionID": 1}

    async def collections_get_compaction_state(self, body: dict[str, Any]) -> Any:
        return {"state": "Completed"}

    async def collections_get_load_state(self, body: dict[str, Any]) -> Any:
        return {"loadState": "LoadStateLoaded", "loadProgress": 100}

    async def indexes_list(self, body: dict[str, Any]) -> Any:
        return ["vector"] if self.store.collections[body["collectionName"]]["indexed"] else []

    async def indexes_create(self, body: dict[str, Any]) -> Any:
        self.store.change({"op": "index", "name": body["collectionName"], "there": True})
        return {}

    async def indexes_drop(self, body: dict[str, Any]) -> Any:
        self.store.change({"op": "index", "name": body["collectionName"], "there": False})
        return {}

    async def indexes_describe(self, body: dict[str, Any]) -> Any:
        rows = len(self.store.collections[body["collectionName"]]["rows"])
        return [{"indexState": "Finished", "pendingRows": 0, "indexedRows": rows}]

    async def entities_insert(self, body: dict[str, Any], upsert: bool = False) -> Any:
        kept = self.store.collections[body["collectionName"]]
        rows = [{name: _plain(name, value) for name, value in row.items()} for row in _rows(body["data"])]
        if kept["auto"]:
            rows = [{kept["pk"]: 10**6 + self.store.inserts * 1000 + i, **row} for i, row in enumerate(rows)]
        doubled = rows if self.store.fault == "doubles" and not upsert and self.store.inserts % 5 == 0 else []
        change = {"op": "put", "name": body["collectionName"], "upsert": upsert}
        if self.store.fault == "halves" and len(rows) > 1 and "number" in rows[0]:
            self.store.change({**change, "rows": rows[::2]})
            if self.store.inserts > 60:
                os._exit(9)
            self.store.change({**change, "rows": rows[1::2]})
        else:
            self.store.change({**change, "rows": rows + doubled})
        op = "upsert" if upsert else "insert"
        return {f"{op}Count": len(rows), f"{op}Ids": [row[kept["pk"]] for row in rows]}

    async def entities_upsert(self, body: dict[str, Any]) -> Any:
        return await self.entities_insert(body, upsert=True)

    async def entities_delete(self, body: dict[str, Any]) -> Any:
        kept = self.store.collections[body["collectionName"]]
        keys = [row[kept["pk"]] for row in kept["rows"] if passes(body["filter"], row)]
        self.store.change({"op": "delete", "name": body["collectionName"], "keys": keys})
        return {"deleteCount": len(keys)}

    async def entities_query(self, body: dict[str, Any]) -> Any:
        rows = [row for row in self._rows_of(body) if passes(body.get("filter", ""), row)]
        return [{"count(*)": len(rows)}] if body["outputFields"] == ["count(*)"] else rows

    async def entities_get(self, body: dict[str, Any]) -> Any:
        pk = self.store.collections[body["collectionName"]]["pk"]
        return [row for row in self._rows_of(body) if row[pk] in body["id"]]

    async def entities_search(self, body: dict[str, Any]) -> Any:
        kept = self.store.collections[body["collectionName"]]
        rows = [row for row in self._rows_of(body) if passes(body.get("filter", ""), row)]
        if self.store.fault == "old":
            rows = [kept["old"].get(row[kept["pk"]], row) for row in rows]
        query = np.array(_plain("vector", body["data"][0]), dtype=np.float64)
        if not rows:
            return []
        vectors = np.array([row["vector"] for row in rows], dtype=np.float64)
        cosine = len(query) != 8
        scores = vectors @ query if cosine else ((vectors - query) ** 2).sum(axis=1)
        order = np.argsort(-scores if cosine else scores, kind="stable")[: body["limit"]]
        return [{**rows[i], "distance": float(scores[i])} for i in order.tolist()]

    def _rows_of(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.store.collections[body["collectionName"]]["rows"]
        return rows


def _rows(data: Any) -> list[dict[str, Any]]:
    """Return rows from a list of rows or a map of columns."""
    if isinstance(data, list):
        return data
    kinds = {"id": "<i8", "bucket": "<i4", "lemma_count": "<i8", "link_count": "<i8"}
    columns = {}
    for name, column in data.items():
        columns[name] = np.frombuffer(column, kinds[name]).tolist() if name in kinds else column
    rows = len(columns["id"])
    columns["vector"] = np.frombuffer(data["vector"], "<f4").reshape(rows, -1).tolist()
    return [{name: column[i] for name, column in columns.items()} for i in range(rows)]


def _plain(name: str, value: Any) -> Any:
    return np.frombuffer(value, "<f4").tolist() if isinstance(value, bytes) else value


async def _ready(request: web.Request) -> web.Response:
    return web.Response(text="ready")


def main() -> None:
    fault = os.environ.get("FAKE_FAULT", "")
    if sys.argv[1] == "check":
        sys.exit("something is wrong" if fault == "unclean" or not sound(sys.argv[2]) else 0)
    options = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    host, _, port = options["--listen"].rpartition(":")
    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/v2/vectordb/{rest:.*}", Handlers(Store(options["--data"], fault)).post)
    app.router.add_get("/readyz", _ready)
    web.run_app(app, host=host, port=int(port), print=None, access_log=None, handler_cancellation=False,
                shutdown_timeout=0.2)  # fmt: skip
    if fault == "stubborn":
        sys.exit(3)


if __name__ == "__main__":
    main()
