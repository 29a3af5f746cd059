"""What clients see of a node: the HTTP server and the gRPC server behind it, on one port.

`node/app.py` imports this on a thread while the node reads its data.
"""

from __future__ import annotations

import logging
import socket
from typing import Final

from aiohttp import web

from cluster.access import Access
from node.api.server import make_app
from node.audit import Audit
from node.client_tls import ClientTls
from node.clock import SystemClock
from node.connections import GuardedSite, connections_max
from node.database import Database
from node.descriptors import raise_descriptor_limit
from node.edge import Edge
from node.grpc.late import LateGrpc
from node.guard import WELL_KNOWN, Guard
from node.metrics import Metrics
from node.node import Node
from node.peers import PeerNetwork
from node.settings import Settings
from node.workers import Workers

log = logging.getLogger(__name__)

BACKLOG: Final = 1024


async def listen(
    listener: socket.socket,
    node: Node,
    settings: Settings,
    metrics: Metrics,
    clock: SystemClock,
    workers: Workers,
    tls: ClientTls | None,
) -> tuple[web.AppRunner, LateGrpc]:
    """Serve clients from now on; return what to end for that to end."""
    database = Database(node)
    edge = Edge(
        settings.api,
        metrics,
        clock=clock,
        executor=workers,
        admission=node.admission,
        ready=lambda: why_not_ready(node),
        guard=guard_of(node, settings, clock, workers),
    )
    app = make_app(database, edge, standard_status=settings.api.standard_error_status)
    app.on_shutdown.append(lambda _: database.imports.mine.stop())
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=settings.api.drain_s_max)
    await runner.setup()
    grpc = LateGrpc(database, edge)
    await database.imports.mine.start()
    address = settings.node.listen
    limit = connections_max(raise_descriptor_limit())
    context = None if tls is None else (lambda: tls.context)
    await GuardedSite(runner, listener, limit, backlog=BACKLOG, grpc=grpc, tls=context).start()
    log.info(
        "listening address=%s protocols=%s node=%s data=%s",
        address,
        "http,grpc" if tls is None else "https,grpcs",
        settings.node.name,
        settings.node.data,
    )
    return runner, grpc


def guard_of(node: Node, settings: Settings, clock: SystemClock, workers: Workers) -> Guard | None:
    """Return what looks at who asks; None where nobody is asked who they are and nothing is written down."""
    auth = settings.auth
    if not auth.enabled and not auth.audit_file:
        return None
    if auth.enabled and auth.root_password == WELL_KNOWN:
        log.warning(
            "root has the password that everybody knows until it is changed: set auth.root_password_file on every "
            "node, or use users/update_password"
        )
    audit = Audit(auth, clock)

    def access() -> Access | None:
        return node.control.machine.access if node.takes_part else None

    return Guard(settings, clock, workers, audit, access, lambda: node.catalog)


def why_not_ready(node: Node) -> str:
    """Return why the node should not get traffic yet, or "". While indexes load it answers, exactly but slowly."""
    if node.failed.done():
        return "the node has failed"
    why, network = node.why_not_ready, node.seams.network
    if why and isinstance(network, PeerNetwork):
        why = "; ".join([why, *(f"{peer.name}: {peer.trouble}" for peer in network.states() if not peer.is_up)])
    return why
