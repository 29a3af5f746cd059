"""Handlers of what operators ask about nodes: `/v2/annulus/nodes/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from node.api.calls import Call, Handler
from node.api.replies import success

Envelope = Mapping[str, Any]


async def find_entry(call: Call) -> Envelope:
    return success(await call.service.nodes.entry())


async def list_nodes(call: Call) -> Envelope:
    return success(await call.service.nodes.describe())


async def drain_node(call: Call) -> Envelope:
    values = call.values
    await call.service.nodes.drain(values["nodeName"], undo=values["undo"], force=values["force"])
    return success({})


async def remove_node(call: Call) -> Envelope:
    await call.service.nodes.remove(call.values["nodeName"])
    return success({})


async def replace_node(call: Call) -> Envelope:
    await call.service.nodes.replace(call.values["nodeName"], call.values["newNodeName"])
    return success({})


async def pause_moves(call: Call) -> Envelope:
    await call.service.nodes.pause(True)
    return success({})


async def resume_moves(call: Call) -> Envelope:
    await call.service.nodes.pause(False)
    return success({})


HANDLERS: Final[Mapping[str, Handler]] = {
    one.__name__: one
    for one in (find_entry, list_nodes, drain_node, remove_node, replace_node, pause_moves, resume_moves)
}
