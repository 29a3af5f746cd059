"""Changes of the catalogue on three processes, the one that coordinates them killed in the middle."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from tests.process.clusters import Trio, put
from tests.process.running import Running, until

PER_CLIENT = 12


def keyed(node: Running, path: str, key: str, **body: Any) -> dict[str, Any]:
    """Return the reply to a request under a key."""
    raw = node.send(path, json.dumps(body).encode(), Annulus_Idempotency_Key=key)[1]
    reply: dict[str, Any] = json.loads(raw)
    return reply


def test_the_leader_of_the_control_group_killed_amid_creates(tmp_path: Path) -> None:
    """kill -9 of the coordinator while clients create, fill, truncate and drop collections through the other nodes,
    each request under a key and repeated until it is answered: all are made, once; every node says the same, also after
    the killed one is back and after all were killed."""
    with Trio(tmp_path / "trio", settings={"shards": "4"}) as trio:
        victim = trio.wait_leader("control")
        others = [node for name, node in trio.nodes.items() if name != victim]
        failed: list[str] = []
        made: list[str] = []

        def until_answered(node: Running, path: str, key: str, **body: Any) -> None:
            for _ in range(60):
                reply = keyed(node, path, key, **body)
                if reply["code"] == 0:
                    return
                if reply["code"] not in (1, 2, 10_001):
                    break
                time.sleep(0.1)
            failed.append(f"{key}: {reply}")

        def client(number: int) -> None:
            node = others[number % 2]
            for count in range(PER_CLIENT):
                name = f"c{number}_{count}"
                until_answered(
                    node, "/collections/create", f"create {name}", collectionName=name, dimension=2,
                    params={"shardsNum": 4},
                )  # fmt: skip
                if count % 3 == 0:
                    until_answered(node, "/collections/truncate", f"truncate {name}", collectionName=name)
                    put(node, name, [1, 2])
                    reply = keyed(node, "/collections/truncate", f"truncate {name}", collectionName=name)
                    assert reply["code"] == 0
                if count % 3 == 1:
                    until_answered(node, "/collections/drop", f"drop {name}", collectionName=name)
                made.append(name)

        clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for one in clients:
            one.start()
        until(lambda: len(made) >= PER_CLIENT, what="some of the changes")
        trio[victim].kill()
        for one in clients:
            one.join()
        assert failed == [] and len(made) == 4 * PER_CLIENT
        kept = {name for name in made if int(name.partition("_")[2]) % 3 != 1}
        trio[victim].launch()
        trio.wait_ready(trio[victim])
        same(trio, kept)
        trio.kill()
        trio.start()
        same(trio, kept)


def same(trio: Trio, names: set[str]) -> None:
    """Every node lists these collections, describes all alike, and finds the rows that were written."""
    described: dict[str, Any] = {}
    for node in trio:
        assert set(node.ask("/collections/list")) == names
        for name in names:
            found = node.ask("/collections/describe", collectionName=name)
            assert described.setdefault(name, found) == found and found["shardsNum"] == 4
            assert found["load"] == "LoadStateLoaded"
            assert node.count(name) == (2 if int(name.partition("_")[2]) % 3 == 0 else 0)
