"""A disk that fails to sync: the node says so and ends, and every answered write is there when it starts again."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from tests.process.running import Running, check

EXIT_FAILED = 70


def test_a_failed_sync_ends_the_node(tmp_path: Path) -> None:
    """No write is answered with success after the sync has failed; the node exits with 70; the restart has all rows."""
    flag = tmp_path / "fail"
    program = [sys.executable, "-m", "tests.process.failing_sync", str(flag)]
    node = Running(tmp_path / "n1", program=program)
    answered: set[int] = set()

    def client(number: int) -> None:
        for key in range(number * 1_000, (number + 1) * 1_000):
            failing = flag.exists()
            body = {"collectionName": "c", "data": [{"id": key, "vector": [1, 0]}]}
            try:
                reply = json.loads(node.send("/entities/insert", json.dumps(body).encode())[1])
            except (OSError, ValueError):
                return
            if reply["code"] != 0:
                return
            assert not failing
            answered.add(key)
            if len(answered) == 100:
                flag.touch()

    with node:
        node.ask("/collections/create", collectionName="c", dimension=2, params={"shardsNum": 4})
        clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        assert node.process.wait(20) == EXIT_FAILED
        assert [one for one in node.events() if one["level"] == "critical"]
    assert len(answered) >= 100
    flag.unlink()
    status, said = check(node.data)
    assert status == 0, said
    with node:
        found = node.ask("/entities/query", collectionName="c", limit=16_384, outputFields=["id"])
        assert answered <= {row["id"] for row in found}
