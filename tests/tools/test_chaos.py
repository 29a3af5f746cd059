"""Chaos's own tests: plans and figures by tables, the proxy and the shim at work, checkers against planted lies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock
from xml.etree import ElementTree

import pytest
from aiohttp import web
from click.testing import CliRunner

from node.handshake import HELLO_BYTES, Identity, dial
from node.network import Link
from tools.bench.wire import BASE_PATH, Address
from tools.chaos.__main__ import _chosen, main
from tools.chaos.failover import outage
from tools.chaos.faults import FAULTS, plan
from tools.chaos.figures import gaps, longest_gap_s, percentile, rates, repeats
from tools.chaos.fleet import Attempt, Fleet, Kind, Outcome, Request, Session
from tools.chaos.machines import Machines
from tools.chaos.proxy import Proxies, ProxyProcess, Rule
from tools.chaos.registers import SUBJECT, Registers
from tools.chaos.report import page, summary
from tools.chaos.run import Happening, Record, Run
from tools.chaos.shim import Control, Disk, build
from tools.crash.api import Answered, Unknown
from tools.crash.clients import World
from tools.crash.model import Kind as Broken
from tools.crash.model import Violation
from tools.crash.rows import row
from tools.crash.trace import Trace

PROJECT = Path(__file__).resolve().parents[2]
SHORT_S = 0.2


# --- the plan ----------------------------------------------------------------------------------------------------


def test_the_plan_is_a_function_of_the_seed() -> None:
    """The same seed plans the same faults, other seeds plan others, and over some seeds every fault comes."""
    names = list(FAULTS)
    plans = [plan(str(seed), 60, names) for seed in range(40)]
    assert plans == [plan(str(seed), 60, names) for seed in range(40)]
    assert plans[0] != plans[1]
    assert {one.name for planned in plans for one in planned} == set(names)
    for planned in plans:
        assert planned == sorted(planned, key=lambda one: one.at_s)
        assert all(FAULTS[one.name].lasts_s[0] <= one.lasts_s <= FAULTS[one.name].lasts_s[1] for one in planned)
        assert len({one.seed for one in planned}) == len(planned)


def test_one_fault_alone_comes_one_at_a_time() -> None:
    """With a single name, faults never overlap; with none, there are none; mixes overlap now and then."""
    alone = plan("1", 300, ["pause-any"])
    assert len(alone) > 20
    assert all(a.at_s + a.lasts_s <= b.at_s for a, b in pairwise(alone))
    assert plan("1", 300, []) == []
    mixed = plan("1", 300, list(FAULTS))
    assert any(a.at_s + a.lasts_s > b.at_s for a, b in pairwise(mixed))


def test_list_explains_every_fault() -> None:
    """`--list` names each fault; an unknown one is refused with a hint."""
    told = CliRunner().invoke(main, ["--list"])
    assert told.exit_code == 0
    assert all(name in told.output for name in FAULTS)
    refused = CliRunner().invoke(main, ["--only", "meteor"])
    assert refused.exit_code == 2 and "meteor" in refused.output and "--list" in refused.output


def test_nodes_come_and_go_only_if_that_is_asked_for() -> None:
    """Faults that change which nodes there are come with --churn, or by their names."""
    churning = {name for name, one in FAULTS.items() if one.churns}
    assert churning == {"join", "drain-remove", "replace", "zone-loss", "coordinator", "pause-moves"}
    assert not churning & set(_chosen((), (), churn=False))
    assert churning < set(_chosen((), (), churn=True)) == set(FAULTS)
    assert _chosen(("join",), (), churn=False) == ["join"]
    assert "zone-loss" not in _chosen((), ("zone-loss",), churn=True)


# --- the network -------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def echo() -> AsyncIterator[Address]:
    """A server that sends back what it gets."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
            writer.write_eof()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


class Line:
    """One connection from a to b through their proxy."""

    def __init__(self, proxies: Proxies, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.proxies = proxies
        self.port = port
        self.reader = reader
        self.writer = writer

    @classmethod
    async def of_a(cls, proxies: Proxies, port: int) -> Line:
        """Connect to a proxy as node a does."""
        one = cls(proxies, port, *await asyncio.open_connection("127.0.0.1", port))
        me = Identity("a", bytes(16), b"", bytes(8))
        assert await one.returns(next(dial(me, "b", Link.SMALL, bytes(32))).send)
        return one

    async def returns(self, data: bytes, *, within_s: float = 10) -> bool:
        """Send bytes; return whether the same come back in time. What comes later comes to the next who reads."""
        self.writer.write(data)
        try:
            return await asyncio.wait_for(self.reader.readexactly(len(data)), within_s) == data
        except TimeoutError:
            return False


@contextlib.asynccontextmanager
async def line() -> AsyncIterator[Line]:
    async with echo() as address:
        proxies = Proxies()
        one = await Line.of_a(proxies, await proxies.open("b", address))
        try:
            yield one
        finally:
            one.writer.transport.abort()
            proxies.close()
            await asyncio.sleep(0)


@pytest.mark.parametrize("way", [("a", "b"), ("b", "a")])
def test_a_cut_way_holds_what_it_is_given(way: tuple[str, str]) -> None:
    """Nothing passes a cut way, in either direction of a connection; after healing everything arrives, in order."""

    async def story() -> None:
        async with line() as one:
            assert await one.returns(b"before")
            one.proxies.set_rule(*way, Rule(cut=True))
            assert not await one.returns(b"held", within_s=SHORT_S)
            one.writer.write(b"later")
            one.proxies.set_rule(*way, Rule())
            assert await asyncio.wait_for(one.reader.readexactly(9), 10) == b"heldlater"

    asyncio.run(story())


def test_the_other_way_flows() -> None:
    """With a to b cut, what b sends still arrives at a."""

    async def story() -> None:
        async with line() as one:
            one.writer.write(b"echo")
            await asyncio.sleep(SHORT_S)  # it is on its way back, or back
            one.proxies.set_rule("a", "b", Rule(cut=True))
            assert await asyncio.wait_for(one.reader.readexactly(4), 10) == b"echo"

    asyncio.run(story())


def test_delay_and_throttle_cost_at_least_their_time() -> None:
    """A delayed byte is not early; 10 kB through 50 kB/s are not early; a delay adds no wait per piece."""

    async def story() -> None:
        clock = asyncio.get_running_loop().time
        async with line() as one:
            one.proxies.set_rule("a", "b", Rule(delay_s=0.15))
            began_s = clock()
            assert await one.returns(b"x")
            assert clock() - began_s >= 0.15
            one.proxies.set_rule("a", "b", Rule(bytes_per_s=50_000))
            began_s = clock()
            assert await one.returns(bytes(10_000))
            assert clock() - began_s >= 0.2

    asyncio.run(story())


def test_a_reset_breaks_connections_and_new_ones_work() -> None:
    """Both ends of a connection are told; the next connection is as good as new."""

    async def story() -> None:
        async with line() as one:
            assert await one.returns(b"x")
            one.proxies.reset("a", "b")
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(one.reader.read(1), 10) == b""
            other = await Line.of_a(one.proxies, one.port)
            assert await other.returns(b"again")
            other.writer.transport.abort()

    asyncio.run(story())


@pytest.mark.parametrize("raw", ["closed", "none"])
def test_a_reset_passes_over_what_is_closed_already(raw: str) -> None:
    """A connection that ended a moment ago, whose end has yet to be noticed, is no reason to fail, nor to spare others.

    Its socket is closed, or there is none any more, while its transport does not know of it.
    """
    closed = socket.socket()
    closed.close()
    gone = mock.Mock(asyncio.StreamWriter)
    gone.get_extra_info.return_value = closed if raw == "closed" else None
    gone.transport.is_closing.return_value = False

    async def story() -> None:
        async with line() as one:
            assert await one.returns(b"x")
            one.proxies._connections["a", "b"].add(gone)
            one.proxies.reset("a", "b")
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(one.reader.read(1), 10) == b""
            gone.transport.abort.assert_called_once()

    asyncio.run(story())


def test_proxies_that_died_are_an_error() -> None:
    """Nothing that is tried without the proxies counts as a trial."""

    async def story() -> None:
        async with echo() as address:
            process = ProxyProcess()
            await process.start()
            await process.open("b", address)
            assert process._process is not None
            process._process.kill()
            await process._process.wait()
            with pytest.raises(RuntimeError, match="proves nothing"):
                process.reset([("a", "b")])
            await process.stop()

    asyncio.run(story())


def test_who_does_not_say_who_it_is_is_not_let_through() -> None:
    """No connection gets around the rules because the proxy cannot tell whose it is."""

    async def story() -> None:
        async with echo() as address:
            proxies = Proxies()
            port = await proxies.open("b", address)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\n" + bytes(HELLO_BYTES))
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(1), 10) == b""
            writer.transport.abort()
            proxies.close()
            await asyncio.sleep(0)

    asyncio.run(story())


def test_disturbances_add_up_in_the_process() -> None:
    """Two disturbances of a way hold together; when one ends the other still holds; then all flows."""

    async def story() -> None:
        async with echo() as address:
            process = ProxyProcess()
            await process.start()
            try:
                await process.open("b", address)
                one = await Line.of_a(Proxies(), process.address("b").port)
                assert await one.returns(b"x")
                with process.disturbed([("a", "b")], Rule(cut=True)):
                    with process.disturbed([("a", "b")], Rule(cut=True, delay_s=0.01)):
                        pass
                    await asyncio.sleep(SHORT_S)
                    assert not await one.returns(b"y", within_s=SHORT_S)
                assert await asyncio.wait_for(one.reader.readexactly(1), 10) == b"y"
                one.writer.transport.abort()
            finally:
                await process.stop()

    asyncio.run(story())


# --- disk and clock ----------------------------------------------------------------------------------------------

VICTIM = """
import os, sys, time
file = open(os.path.join(sys.argv[1], "file"), "ab", buffering=0)
for asked in sys.stdin:
    told = []
    for act in (lambda: file.write(b"x"), lambda: os.fdatasync(file.fileno())):
        try:
            act()
            told.append("ok")
        except OSError as error:
            told.append(str(error.errno))
    free = "room" if os.statvfs(sys.argv[1]).f_bavail else "none"
    print(*told, free, time.time() - float(asked), flush=True)
"""


def test_a_process_believes_of_its_disk_and_clock_what_it_is_told(tmp_path: Path) -> None:
    """Full: no write passes and no room is seen. Failing: writes pass and syncs do not. The clock goes where it is
    sent. All is taken back while the process runs."""
    library = build(str(tmp_path))
    if library is None:
        pytest.skip("no C compiler")
    data = tmp_path / "data"
    data.mkdir()
    control = Control(str(tmp_path / "control"))
    environment = {**os.environ, **control.environment(library, str(data))}
    command = [sys.executable, "-c", VICTIM, str(data)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def told() -> tuple[str, float]:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(f"{time.time()}\n")
            process.stdin.flush()
            said, _, off_s = process.stdout.readline().strip().rpartition(" ")
            return said, float(off_s)

        assert told()[0] == "ok ok room"
        control.set(disk=Disk.FULL)
        assert told()[0] == "28 ok none"
        control.set(disk=Disk.SYNC_FAILS)
        assert told()[0] == "ok 5 room"
        control.set(disk=Disk.FINE, clock_s=-3600)
        said, off_s = told()
        assert said == "ok ok room" and off_s < -3000
        control.set(clock_s=0)
        assert told()[1] > -3000
        process.stdin.close()


# --- the client --------------------------------------------------------------------------------------------------


class Script:
    """A node that answers as it is told, in turn, and remembers what it was asked."""

    def __init__(self, *answers: tuple[int, Mapping[str, str]] | None) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        self.asked += 1
        answer = self.answers.pop(0) if self.answers else (0, {})
        if answer is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        code, headers = answer
        return web.json_response({"code": code, "message": "as told", "data": "done"}, headers=headers)


@contextlib.asynccontextmanager
async def fleet(script: Script, *, with_a_dead_one: bool = False) -> AsyncIterator[Fleet]:
    app = web.Application()
    app.router.add_post(BASE_PATH + "/{rest:.*}", script.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address = Address("127.0.0.1", runner.addresses[0][1])
    dead = {"dead": Address("127.0.0.1", 1)} if with_a_dead_one else {}
    try:
        made = Fleet({**dead, "n1": address}, random.Random(1))
        async with made.connected():
            yield made
    finally:
        await runner.cleanup()


SOON = {"Retry-After": "0"}


@pytest.mark.parametrize(
    ("path", "answers", "outcome", "asked"),
    [
        pytest.param("/entities/insert", [], Outcome.OK, 1, id="a write that is made"),
        pytest.param("/entities/insert", [(1, SOON), (4, SOON)], Outcome.OK, 3, id="refused, so repeated"),
        pytest.param("/entities/insert", [(2, {})], Outcome.UNKNOWN, 1, id="the leader was lost: not repeated"),
        pytest.param("/entities/insert", [(10_001, {})], Outcome.UNKNOWN, 1, id="time was up: not repeated"),
        pytest.param("/entities/insert", [None], Outcome.UNKNOWN, 1, id="no answer: not repeated"),
        pytest.param("/entities/query", [None, (2, {}), (10_001, {})], Outcome.OK, 4, id="a read is repeated"),
    ],
)
def test_what_is_repeated(
    path: str, answers: Sequence[tuple[int, Mapping[str, str]] | None], outcome: Outcome, asked: int
) -> None:
    """A write is repeated only while it certainly was not made; a read always."""

    async def story() -> None:
        script = Script(*answers)
        async with fleet(script) as one:
            attempts: list[Attempt] = []
            with contextlib.nullcontext() if outcome is Outcome.OK else pytest.raises(Unknown):
                await one.ask(path, {"collectionName": "c"}, watch=lambda: attempts.append)
            assert script.asked == asked == len(attempts)
            assert [request.outcome for request in one.requests] == [outcome]
            assert one.requests[0].attempts == asked and one.requests[0].collection == "c"

    asyncio.run(story())


def test_a_node_that_does_not_listen_is_passed_over() -> None:
    """What a dead node was asked goes to another, be it a write; an answer that the request is wrong is final."""

    async def story() -> None:
        script = Script()
        async with fleet(script, with_a_dead_one=True) as one:
            for _ in range(20):
                assert await one.call("/entities/insert", collectionName="c") == "done"
            assert any(request.attempts > 1 for request in one.requests)
            script.answers = [(1100, {})]
            with pytest.raises(Answered):
                await one.call("/entities/insert", collectionName="c")

    asyncio.run(story())


def test_a_pause_waits_for_what_is_under_way() -> None:
    """While paused nothing is sent; afterwards it is."""

    async def story() -> None:
        script = Script()
        async with fleet(script) as one:
            await one.pause()
            waiting = asyncio.create_task(one.call("/entities/query", collectionName="c"))
            await asyncio.sleep(SHORT_S)
            assert script.asked == 0
            one.go_on()
            assert await waiting == "done" and script.asked == 1

    asyncio.run(story())


# --- the registers -----------------------------------------------------------------------------------------------


class Liar(Fleet):
    """Keys in a dictionary, and one lie: what every register checker is there to notice."""

    def __init__(self, lie: str) -> None:
        super().__init__({"n1": Address("127.0.0.1", 1)}, random.Random(1))
        self.lie = lie
        self.now: dict[int, int] = {}
        self.before: dict[int, int] = {}
        self.writes = self.reads = 0

    async def _attempt(
        self, node: str, path: str, body: Mapping[str, Any], session: Session
    ) -> tuple[Attempt, Answered | Unknown | None]:
        began_s = time.monotonic()
        await asyncio.sleep(0.001)
        if path == "/entities/query":
            self.reads += 1
            data: Any = self._rows(_keys(body["filter"]), str(body["consistencyLevel"]))
        else:
            self.writes += 1
            data = {}
            if self.lie != "forgets" or self.writes % 10:
                self.before = dict(self.now)
                self._write(path, body)
        await asyncio.sleep(0.001)
        return Attempt(node, began_s, time.monotonic(), Outcome.OK, data), None

    def _write(self, path: str, body: Mapping[str, Any]) -> None:
        if path == "/entities/delete":
            for key in _keys(body["filter"]):
                self.now.pop(key, None)
        else:
            rows = body["data"][:1] if self.lie == "halves" and self.writes % 2 else body["data"]
            self.now |= {SUBJECT.key_of(one["key"]): one["version"] for one in rows}

    def _rows(self, keys: Sequence[int], level: str) -> list[dict[str, Any]]:
        lying = self.reads % 5 == 0 and (not self.lie.startswith("stale") or level == self.lie.split()[1])
        there = self.before if self.lie.startswith("stale") and lying else self.now
        rows = [row(SUBJECT, key, there[key]) for key in keys if key in there]
        if lying and rows and self.lie == "doubles":
            rows.append(rows[0])
        if lying and rows and self.lie == "damages":
            rows[0] = {**rows[0], "number": 0.5}
        if lying and rows and self.lie == "invents":
            key = SUBJECT.key_of(rows[0]["key"])
            rows[0] = row(SUBJECT, key, 10**9)
        return rows


def _keys(text: str) -> list[int]:
    return [int(one) for one in re.findall(r"\d+", text.partition(" in ")[2])]


@pytest.mark.parametrize(
    ("lie", "noticed"),
    [
        ("none", set()),
        ("stale Strong reads", {Broken.READ}),
        ("stale Session reads", {Broken.READ}),
        ("forgets", {Broken.READ}),
        ("halves", {Broken.READ}),
        ("invents", {Broken.READ}),
        ("doubles", {Broken.DOUBLED}),
        ("damages", {Broken.DAMAGED}),
    ],
)
def test_a_lie_about_registers_is_noticed(lie: str, noticed: set[Broken], tmp_path: Path) -> None:
    """Who answers strong reads with older values, forgets acknowledged writes, makes half of one, or shows what nobody
    wrote, is told so; who answers truly is not."""

    async def story() -> set[Broken]:
        with Trace(str(tmp_path / "trace.jsonl")) as trace:
            world = World({}, trace)
            registers, liar = Registers(world, 1), Liar(lie)
            clients = [asyncio.create_task(registers.client(f"c{c}", liar, random.Random(c))) for c in range(4)]
            end_s = time.monotonic() + 30
            while min(liar.writes, liar.reads) < 150 and time.monotonic() < end_s:  # noqa: ASYNC110  it only counts
                await asyncio.sleep(0.02)
            await liar.pause()
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            registers.judge()
            return {violation.kind for violation in world.violations}

    assert asyncio.run(story()) == noticed


# --- whole runs --------------------------------------------------------------------------------------------------

FAKE = f"""#!/bin/sh
shift 2
exec {sys.executable} -m tests.tools.dumb_node "$@"
"""


@pytest.mark.parametrize(
    ("fault", "noticed"),
    [
        ("", set()),
        ("late", {Broken.LOST, Broken.GHOST, Broken.STALE, Broken.READ, Broken.CATALOGUE, Broken.COUNT}),
        pytest.param("unclean", {Broken.CHECK}, marks=pytest.mark.slow),
    ],
)
def test_a_run_tells_nodes_that_keep_their_word_from_others(
    fault: str, noticed: set[Broken], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a dumb node that is killed and started: no complaint if it is sound, one of the right kind if not."""
    monkeypatch.setenv("FAKE_FAULT", fault)
    fake = tmp_path / "fake"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    with Trace(str(tmp_path / "trace.jsonl")) as trace:
        run = Run(
            str(tmp_path / "data"), seed=1, nodes=1, names=["kill-leader", "halves"], trace=trace,
            say=lambda text: None, python=str(fake), settings={},
        )  # fmt: skip
        asyncio.run(run.go(4))
    kinds = {violation.kind for violation in run.world.violations}
    assert kinds & noticed if noticed else not kinds, run.world.violations
    assert set(run.record.skipped) == {"halves"}
    assert run.record.happenings and run.world.acknowledged > 0


def test_who_has_gone_is_damaged_no_more(tmp_path: Path) -> None:
    """The node whose chunks rot stays the same one while it is there; another may follow when it has gone."""
    machines = Machines(
        str(tmp_path), nodes=3, settings={}, complain=lambda name, text: None, proxied=False, shimmed=False
    )
    machines.rotten.add("n2")
    asyncio.run(machines.part("n2"))
    assert machines.names == ["n1", "n3"] and not machines.rotten


@pytest.mark.slow
def test_three_nodes_under_all_faults(tmp_path: Path) -> None:
    """A short run of the command itself: three real nodes, every kind of fault, a report, and 0 in the end."""
    report = tmp_path / "run.html"
    command = [sys.executable, "-m", "tools.chaos", "--seed", "1", "--minutes", "0.5", "--report", str(report)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every promise kept" in report.read_text(encoding="utf-8")


# --- what is left to read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "gap_s"),
    [
        pytest.param([0, 1, 2, 3, 4, 5, 6], 1.0, id="steady"),
        pytest.param([0, 1.5, 4.5, 5], 3.0, id="a hole within"),
        pytest.param([0, 9], 5.0, id="a hole beyond the end counts up to it"),
        pytest.param([-3, 4], 4.5, id="a hole from before counts whole"),
        pytest.param([], 4.0, id="no answer at all"),
    ],
)
def test_the_longest_gap(answers: list[float], gap_s: float) -> None:
    """Around a fault from 1 s to 5 s, the longest time between two answers is found."""
    if answers and answers[0] < 0:
        answers = [-0.5, answers[1]]
    assert longest_gap_s(answers, 1.0, 5.0) == gap_s


def test_percentiles_are_of_what_was_measured() -> None:
    """The value that at least the share does not exceed."""
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert percentile([3.0], 0.99) == 3.0 and percentile([], 0.5) == 0.0


@pytest.mark.parametrize(
    ("acknowledged", "paused", "resumed"),
    [
        ([9.9, 10.25, 11.5, 11.75, 12.0, 12.5, 12.9], 1.25, 1.5),
        ([9.9, 10.25, 10.5, 10.75, 11.5, 12, 12.5], 0.75, 1.5),
        ([9.9, 10.25], 2.75, 3.0),
        ([9.9], 3.0, 3.0),
    ],
)
def test_writes_resume_when_the_longest_outage_ends(acknowledged: list[float], paused: float, resumed: float) -> None:
    """After the leader went at 10 s: one late acknowledgement does not end the outage; without more it lasts to 13."""
    assert outage(acknowledged, 10.0, 13.0) == pytest.approx((paused, resumed))


def test_the_figures_are_those_of_the_requests() -> None:
    """Counts, repeats, rates and gaps of a small run, by hand."""
    requests = [_request(Kind.WRITE, at_s / 10) for at_s in range(100) if not 30 <= at_s < 50]
    requests += [_request(Kind.RELAXED, at_s / 10, attempts=1 + (at_s == 30)) for at_s in range(100)]
    requests.append(_request(Kind.WRITE, 4.0, outcome=Outcome.UNKNOWN))
    record = Record(0.0, 1, 3, happenings=[Happening("kill-leader", 3.0, 3.5, "n1")], calm=[(9.0, 10.0)], rounds=1)
    assert repeats(requests, Kind.RELAXED) == {1: 99, 2: 1}
    assert rates(requests, [Kind.WRITE], began_s=0, bin_s=1, bins=10)[2:5] == [(10, 0), (0, 0), (0, 1)]
    (found,) = gaps(requests, record)
    assert (found.fault, found.times) == ("kill-leader", 1)
    assert found.longest_s[Kind.WRITE] == [pytest.approx(2.1)]
    assert found.longest_s[Kind.RELAXED] == [pytest.approx(0.1)]
    assert summary(requests, record)["requests: write"].startswith("81, 1 without an answer")


def test_the_page_shows_everything_and_loads_nothing() -> None:
    """Verdict, violations, faults and leaders are on the page; its picture is well formed; it refers to nothing."""
    requests = [_request(Kind.WRITE, at_s / 10) for at_s in range(100)]
    record = Record(0.0, 1, 3, happenings=[Happening("deaf", 3.0, 3.5, "n1 <leads 0>")], calm=[(9.0, 10.0)], rounds=1)
    violation = Violation(Broken.LOST, "c on n2", "key 5 is not there")
    text = page(
        command="python -m tools.chaos --seed 1",
        record=record,
        ended_s=11.0,
        requests=requests,
        leaders=[(0.5, 0, "n1"), (3.2, 0, "n2")],
        names=["n1", "n2", "n3"],
        violations=[violation],
        facts={"seed": 1},
    )
    assert "1 promises broken" in text and "key 5 is not there" in text and FAULTS["deaf"].sentence in text
    assert "http:" not in text and "https:" not in text and "src=" not in text
    found = re.search(r"<svg.*</svg>", text, re.DOTALL)
    assert found is not None
    titles = [one.text for one in ElementTree.fromstring(found[0]).iter("title")]
    assert titles == ["deaf: n1 <leads 0>, 3.0 s to 3.5 s", "shard 0: n1", "shard 0: n2"]


def _request(kind: Kind, at_s: float, *, attempts: int = 1, outcome: Outcome = Outcome.OK) -> Request:
    return Request(kind, "c", at_s, at_s, outcome, attempts, "")


def test_a_node_is_removed_though_the_answer_was_lost() -> None:
    """Who asks again is told that there is no such node, and looks whether that is so."""
    listed = [{"nodes": [{"name": "n1"}, {"name": "n5"}]}, {"nodes": [{"name": "n1"}]}]
    asked: list[str] = []

    async def operate(what: str, **body: str) -> object:
        asked.append(what)
        return listed.pop(0) if what == "list" else None

    asyncio.run(Machines.removed(cast(Machines, SimpleNamespace(operate=operate, patience=1.0)), "n5"))
    assert asked == ["remove", "list", "remove", "list"]
