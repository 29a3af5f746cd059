"""What operators ask about nodes reaches the service as it was said, and a refusal comes back in its words."""

from __future__ import annotations

import pytest

from tests.node.api.fake import Client, serve


def test_what_operators_ask_arrives() -> None:
    """Each route is one call; what is left out has its default."""

    async def script(client: Client) -> None:
        base = "/v2/annulus/nodes/"
        listed = await client.post(base + "list")
        assert listed == {"code": 0, "data": {"nodes": [], "moves": [], "movesPaused": False, "copies": 3}}
        assert (await client.post(base + "entry"))["data"] == {"node": "n1", "peer": "127.0.0.1:1"}
        for what, body in (
            ("drain", {"nodeName": "n2"}),
            ("drain", {"nodeName": "n2", "undo": True, "force": True}),
            ("replace", {"nodeName": "n2", "newNodeName": "n9"}),
            ("pause_moves", {}),
            ("resume_moves", {}),
        ):
            assert await client.post(base + what, body) == {"code": 0, "data": {}}
        assert client.service.operations == [
            ("drain", "n2", False, False),
            ("drain", "n2", True, True),
            ("replace", "n2", "n9"),
            ("pause", True),
            ("pause", False),
        ]

    serve(script)


@pytest.mark.parametrize(
    ("what", "body", "why"),
    [
        pytest.param("remove", {"nodeName": "n7"}, "there is no node n7", id="refused"),
        pytest.param("drain", {}, "nodeName", id="no name"),
        pytest.param("replace", {"nodeName": "n1"}, "newNodeName", id="no heir"),
        pytest.param("drain", {"nodeName": 7}, "nodeName", id="no text"),
    ],
)
def test_what_makes_no_sense_is_refused(what: str, body: dict[str, object], why: str) -> None:
    async def script(client: Client) -> None:
        reply = await client.post(f"/v2/annulus/nodes/{what}", body)
        assert reply["code"] != 0 and why.lower() in reply["message"].lower()
        assert client.service.operations == []

    serve(script)
