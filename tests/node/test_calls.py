"""Calls between nodes: answers, errors, deadlines, lost sessions, overload, and frames that make no sense."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.tick import HybridClock
from node import calls
from node.calls import Answer, Mesh
from node.network import Blob, FrameReader, Link, Receiver, encode_message
from node.settings import Address
from storage.errors import (
    AnnulusError,
    CollectionNotFound,
    InvalidParameter,
    NoLeader,
    Overloaded,
    PeerUnreachable,
    RequestTimeout,
    Unavailable,
)
from storage.types import Tick, tick_from_ms
from tests.node.peer_pair import Host, free_addresses, run, until

NOW_MS = 1_700_000_000_000


class FixedClock:
    """A wall clock that a test sets."""

    def __init__(self) -> None:
        self.now_ms = NOW_MS

    def wall_ms(self) -> int:
        return self.now_ms

    def monotonic_s(self) -> float:
        return self.now_ms / 1000


class Wire:
    """A network of two ends within a test; every frame goes through the real bytes."""

    def __init__(self, me: str, peer: str) -> None:
        self.me, self.peer = me, peer
        self.other: Wire = self
        self.up = False
        self.queued = 0
        self.is_full = False
        self.sent: list[dict[str, Any]] = []
        self.receiver: Receiver

    async def start(self, receiver: Receiver) -> None:
        self.receiver = receiver

    async def stop(self) -> None:
        self.session(False)
        self.other.session(False)

    def set_peers(self, peers: Mapping[str, Sequence[Address]]) -> None:
        pass

    def send(self, peer: str, link: Link, header: Mapping[str, Any], blobs: Sequence[Blob] = ()) -> bool:
        if not self.up or self.is_full or peer != self.peer:
            return False
        stream = b"".join(encode_message(header, blobs))
        self.sent.append(dict(header))
        asyncio.get_running_loop().call_soon(self.other.arrive, link, stream)
        return True

    def arrive(self, link: Link, stream: bytes) -> None:
        reader = FrameReader()
        place = 0
        while place < len(stream):
            buffer = reader.buffer()
            count = min(len(buffer), len(stream) - place)
            buffer[:count] = stream[place : place + count]
            reader.filled(count)
            place += count
            while (frame := reader.next_frame()) is not None:
                if self.up:
                    self.receiver.on_message(self.peer, link, frame.header, frame.blobs)

    def is_up(self, peer: str) -> bool:
        return peer == self.peer and self.up

    def queued_bytes(self, peer: str, link: Link) -> int:
        return self.queued

    def session(self, up: bool) -> None:
        if self.up != up:
            self.up = up
            self.receiver.on_session(self.peer, up)


class Pair:
    """Two meshes, n1 and n2, joined by wires."""

    def __init__(self) -> None:
        self.wires = Wire("n1", "n2"), Wire("n2", "n1")
        self.wires[0].other, self.wires[1].other = self.wires[1], self.wires[0]
        self.clocks = FixedClock(), FixedClock()
        self.hybrids = tuple(HybridClock(clock.wall_ms) for clock in self.clocks)
        self.one, self.two = (
            Mesh(wire, wire.me, hybrid, clock)
            for wire, hybrid, clock in zip(self.wires, self.hybrids, self.clocks, strict=True)
        )

    def session(self, up: bool) -> None:
        for wire in self.wires:
            wire.session(up)


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    both = Pair()
    await both.one.start()
    await both.two.start()
    both.session(True)
    yield both
    await both.one.stop()
    await both.two.stop()


async def echo(peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]) -> Answer:
    return {"peer": peer, **arguments}, list(blobs)


class Patient:
    """A handler that waits until it is let go, and knows who was cancelled."""

    def __init__(self) -> None:
        self.running: set[Any] = set()
        self.cancelled: set[Any] = set()
        self.begun: list[Any] = []
        self.go = asyncio.Event()

    async def __call__(self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]) -> Answer:
        key = arguments.get("n")
        self.begun.append(key)
        self.running.add(key)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.add(key)
            raise
        finally:
            self.running.discard(key)
        return {"n": key}, []


@pytest.mark.parametrize("target", ["n1", "n2"])
@pytest.mark.parametrize("link", list(Link))
def test_a_call_is_answered(target: str, link: Link) -> None:
    """Arguments and blobs arrive, answer and blobs come back; calling oneself is the same."""

    async def story() -> None:
        async with pair() as both:
            both.one.serve("echo", echo)
            both.two.serve("echo", echo)
            answer, blobs = await both.one.call(target, "echo", {"a": [1, {"b": b"c"}]}, [b"x", b""], timeout_s=5,
                                                link=link)  # fmt: skip
            assert answer == {"peer": "n1", "a": [1, {"b": b"c"}]}
            assert [bytes(blob) for blob in blobs] == [b"x", b""]

    run(story())


@pytest.mark.parametrize("target", ["n1", "n2"])
@pytest.mark.parametrize(
    "error",
    [
        InvalidParameter("shard 7 is none of ours"),
        CollectionNotFound("default", "c"),
        NoLeader("shard 3 has no leader"),
        RequestTimeout("too slow"),
        AnnulusError("something odd"),
    ],
    ids=lambda error: error.code,
)
def test_errors_keep_their_names(error: AnnulusError, target: str) -> None:
    """What the handler raises is raised at the caller: same class, same words."""

    async def fails(*_: object) -> Answer:
        raise error

    async def story() -> None:
        async with pair() as both:
            both.one.serve("fails", fails)
            both.two.serve("fails", fails)
            with pytest.raises(type(error)) as caught:
                await both.one.call(target, "fails", {}, timeout_s=5)
            assert (caught.value.code, caught.value.message) == (error.code, error.message)

    run(story())


@pytest.mark.parametrize("target", ["n1", "n2"])
def test_bugs_give_nothing_away(target: str, caplog: pytest.LogCaptureFixture) -> None:
    """Any other exception is logged where it happened; the caller learns only where that is."""

    async def broken(*_: object) -> Answer:
        raise KeyError("password=hunter2")

    async def unsendable(*_: object) -> Answer:
        return {"x": object()}, []

    async def story() -> None:
        async with pair() as both:
            for mesh in (both.one, both.two):
                mesh.serve("broken", broken)
                mesh.serve("unsendable", unsendable)
            methods = ["broken", "unsendable"] if target == "n2" else ["broken"]
            for method in methods:
                with pytest.raises(AnnulusError) as caught:
                    await both.one.call(target, method, {}, timeout_s=5)
                assert caught.value.code == "internal" and "hunter2" not in caught.value.message
                assert method in caught.value.message and target in caught.value.message

    run(story())
    assert "hunter2" in caplog.text


@pytest.mark.parametrize("target", ["n1", "n2"])
def test_a_method_that_is_not_there_may_come(target: str) -> None:
    """A node that starts serves some methods later than others: whoever asks too soon is to ask again."""

    async def story() -> None:
        async with pair() as both:
            with pytest.raises(NoLeader, match=f"node {target} has no method 'nothing': it starts, or runs another"):
                await both.one.call(target, "nothing", {}, timeout_s=5)

    run(story())


@pytest.mark.parametrize("target", ["n1", "n2"])
def test_time_runs_out_on_both_sides(target: str) -> None:
    """The caller gets PeerUnreachable, retriable, and the handler is cancelled."""

    async def story() -> None:
        async with pair() as both:
            patient = Patient()
            both.one.serve("wait", patient)
            both.two.serve("wait", patient)
            with pytest.raises(PeerUnreachable, match=r"did not answer wait within 0\.05 s") as caught:
                await both.one.call(target, "wait", {"n": 1}, timeout_s=0.05)
            assert caught.value.retriable and isinstance(caught.value, Unavailable)
            await until(lambda: patient.cancelled == {1})

    run(story())


def test_the_deadline_travels_along() -> None:
    """The handler is cancelled by the caller's deadline even if the caller cannot say that it gave up."""

    async def story() -> None:
        async with pair() as both:
            patient = Patient()
            both.two.serve("wait", patient)
            call = asyncio.ensure_future(both.one.call("n2", "wait", {"n": 1}, timeout_s=0.2))
            await until(lambda: patient.running)
            both.wires[0].is_full = True
            with pytest.raises(PeerUnreachable):
                await call
            await until(lambda: patient.cancelled == {1})

    run(story())


def test_a_caller_that_gives_up_is_heard() -> None:
    """Cancelling the caller cancels the handler, also one that has not begun; the session goes on."""

    async def story() -> None:
        async with pair() as both:
            patient = Patient()
            both.two.serve("wait", patient)
            tasks = [
                asyncio.ensure_future(both.one.call("n2", "wait", {"n": n}, timeout_s=30))
                for n in range(calls.SERVED_MAX + 5)
            ]
            await until(lambda: len(patient.running) == calls.SERVED_MAX)
            for n in (0, calls.SERVED_MAX + 2):
                tasks[n].cancel()
            await until(lambda: patient.cancelled == {0})
            await until(lambda: len(patient.running) == calls.SERVED_MAX)
            patient.go.set()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(isinstance(answer, asyncio.CancelledError) for answer in answers) == 2
            assert calls.SERVED_MAX + 2 not in patient.begun
            assert not both.one._outstanding

    run(story())


def test_a_lost_session_ends_its_calls() -> None:
    """Who waits gets PeerUnreachable at once, what is served is cancelled, and the next session starts afresh."""

    async def story() -> None:
        async with pair() as both:
            patient = Patient()
            both.two.serve("wait", patient)
            both.two.serve("echo", echo)
            seen: list[tuple[str, bool]] = []
            both.one.on_session(lambda peer, up: seen.append((peer, up)))
            tasks = [asyncio.ensure_future(both.one.call("n2", "wait", {"n": n}, timeout_s=30)) for n in range(100)]
            await until(lambda: len(patient.running) == calls.SERVED_MAX)
            both.session(False)
            errors = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(error, PeerUnreachable) for error in errors)
            await until(lambda: len(patient.cancelled) == calls.SERVED_MAX and not patient.running)
            with pytest.raises(PeerUnreachable, match="there is no session"):
                await both.one.call("n2", "echo", {}, timeout_s=5)
            both.session(True)
            assert (await both.one.call("n2", "echo", {}, timeout_s=5))[0] == {"peer": "n1"}
            assert seen == [("n2", False), ("n2", True)]
            assert len(patient.begun) == calls.SERVED_MAX

    run(story())


def test_a_broken_bulk_link_ends_its_calls_only() -> None:
    """Calls on the small link go on."""

    async def story() -> None:
        async with pair() as both:
            patient = Patient()
            both.two.serve("wait", patient)
            bulk = asyncio.ensure_future(both.one.call("n2", "wait", {"n": 1}, timeout_s=30, link=Link.BULK))
            small = asyncio.ensure_future(both.one.call("n2", "wait", {"n": 2}, timeout_s=30))
            await until(lambda: patient.running == {1, 2})
            for wire in both.wires:
                wire.receiver.on_bulk_lost(wire.peer)
            with pytest.raises(PeerUnreachable, match="bulk link"):
                await bulk
            await until(lambda: patient.cancelled == {1})
            patient.go.set()
            assert (await small)[0] == {"n": 2}

    run(story())


def test_overload_is_refused_soon() -> None:
    """Some calls run, some wait, the rest is told; the other link has places of its own."""

    async def story() -> None:
        async with pair() as both:
            patient = Patient()
            both.two.serve("wait", patient)
            both.two.serve("echo", echo)
            most = calls.SERVED_MAX + calls.WAITING_MAX
            tasks = [asyncio.ensure_future(both.one.call("n2", "wait", {"n": n}, timeout_s=30)) for n in range(most)]
            await until(lambda: len(patient.running) == calls.SERVED_MAX)
            with pytest.raises(Overloaded):
                await both.one.call("n2", "echo", {}, timeout_s=30)
            await both.one.call("n2", "echo", {}, timeout_s=30, link=Link.BULK)
            patient.go.set()
            assert [answer["n"] for answer, _ in await asyncio.gather(*tasks)] == list(range(most))
            assert patient.begun == list(range(most))

    run(story())


def test_calls_wait_for_room() -> None:
    """A full queue delays calls and answers within their time; consensus is sent meanwhile."""

    async def story() -> None:
        async with pair() as both:
            both.two.serve("echo", echo)
            heard: list[Any] = []
            both.two.on_raft(4, lambda peer, header, blobs: heard.append((peer, header, [bytes(b) for b in blobs])))
            both.wires[0].queued = calls.CALL_QUEUE_BYTES_MAX + 1
            with pytest.raises(PeerUnreachable):
                await both.one.call("n2", "echo", {}, timeout_s=0.05)
            call = asyncio.ensure_future(both.one.call("n2", "echo", {}, timeout_s=30))
            assert both.one.send_raft(4, "n2", {"k": 1}, [b"entry"])
            await asyncio.sleep(0.02)
            assert heard == [("n1", {"k": 1}, [b"entry"])] and not call.done()
            both.wires[1].queued = calls.CALL_QUEUE_BYTES_MAX + 1
            both.wires[0].queued = 0
            await asyncio.sleep(0.02)
            assert not call.done()
            both.wires[1].queued = 0
            await call
            assert not [header for header in both.wires[0].sent if header["t"] == "cancel"]

    run(story())


def test_what_is_too_large_is_refused_at_the_caller() -> None:
    """A call that no frame holds is an error of the request, not a lost session."""

    async def story() -> None:
        async with pair() as both:
            with pytest.raises(InvalidParameter, match="too large to be passed on"):
                await both.one.call("n2", "echo", {"a": "x" * (2 << 20)}, timeout_s=5)
            assert not both.one._outstanding

    run(story())


# stamps and Raft messages


def test_stamps_ride_on_every_frame() -> None:
    """Whoever hears of a later stamp never stamps below it, though its own clock is behind."""

    async def story() -> None:
        async with pair() as both:
            both.two.serve("echo", echo)
            both.clocks[0].now_ms += 30_000
            await both.one.call("n2", "echo", {}, timeout_s=5)
            assert both.hybrids[1].stamp() > tick_from_ms(NOW_MS + 30_000)
            assert all(type(header["s"]) is int for wire in both.wires for header in wire.sent)

    run(story())


def test_a_clock_far_ahead_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """It would drag all ticks along: nothing of its frames counts, it is logged once, and it heals."""

    async def story() -> None:
        async with pair() as both:
            both.two.serve("echo", echo)
            both.clocks[0].now_ms += calls.STAMP_AHEAD_MS_MAX + 1_000
            for _ in range(3):
                with pytest.raises(PeerUnreachable):
                    await both.one.call("n2", "echo", {}, timeout_s=0.03)
            assert both.hybrids[1].stamp() < tick_from_ms(NOW_MS + 1)
            assert both.two.refused["stamp_ahead"] >= 3
            both.clocks[1].now_ms = both.clocks[0].now_ms
            await both.one.call("n2", "echo", {}, timeout_s=5)

    run(story())
    assert len([record for record in caplog.records if "61 s ahead of ours" in record.getMessage()]) == 1


def test_raft_messages_find_their_group(caplog: pytest.LogCaptureFixture) -> None:
    """Each goes to its group's handler; unknown groups and handlers that raise harm nobody else."""

    async def story() -> None:
        async with pair() as both:
            heard: list[Any] = []

            def raises(*_: object) -> None:
                raise ValueError("a bug")

            both.two.on_raft(1, lambda peer, header, blobs: heard.append(header))
            both.two.on_raft(2, raises)
            for group in (1, 2, 3, 1):
                assert both.one.send_raft(group, "n2", {"for": group})
            await until(lambda: len(heard) == 2)
            assert both.two.refused == {"unknown_group": 1, "handler_failed": 1}
            both.session(False)
            assert not both.one.send_raft(1, "n2", {})

    run(story())
    assert caplog.records and all(record.levelno >= logging.WARNING for record in caplog.records)


def test_groups_share_frames() -> None:
    """What groups say in one turn is one frame; what goes with blobs has its own, and nothing overtakes it."""

    async def story() -> None:
        async with pair() as both:
            heard: list[tuple[int, Any, list[bytes]]] = []

            def hear(group: int) -> None:
                both.two.on_raft(
                    group, lambda _, header, blobs: heard.append((group, header["n"], [*map(bytes, blobs)]))
                )

            hear(1)
            hear(2)
            for group, number, blobs in ((1, 1, []), (2, 2, []), (1, 3, [b"entry"]), (2, 4, []), (1, 5, [])):
                assert both.one.send_raft(group, "n2", {"n": number}, blobs)
            await until(lambda: len(heard) == 5)
            assert heard == [(1, 1, []), (2, 2, []), (1, 3, [b"entry"]), (2, 4, []), (1, 5, [])]
            assert [len(frame["r"]) for frame in both.wires[0].sent] == [2, 1, 2]
            assert both.one.send_raft(1, "n2", {"n": 6})
            both.session(False)
            both.session(True)
            await asyncio.sleep(0.01)
            assert len(heard) == 5, "nothing of an old session"

    run(story())


SANE = tick_from_ms(NOW_MS)
ODD = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3) | st.lists(st.integers(0, 3), max_size=2)
KEYED = st.fixed_dictionaries(
    {},
    optional={
        "t": st.sampled_from(["raft", "call", "cancel", "reply", "error", "later"]) | ODD,
        "s": st.sampled_from([SANE, -1, 1 << 63, (1 << 63) - 1, True]) | ODD,
        "r": st.lists(st.lists(st.sampled_from([0, 1, {}]) | ODD, max_size=3), max_size=2) | ODD,
        "c": st.sampled_from([1, 2]) | ODD,
        "m": st.sampled_from(["echo", "", "__init__"]) | ODD,
        "a": st.dictionaries(st.text(max_size=2), ODD, max_size=2) | ODD,
        "d": st.sampled_from([1, 1000, 1 << 60]) | ODD,
        "e": st.sampled_from([["no_leader", "x"], ["", ""], [1, 2], []]) | ODD,
    },
)


@given(st.lists(KEYED, max_size=20))
def test_no_header_does_harm(headers: list[dict[str, Any]]) -> None:
    """Whatever a peer of another make says, the mesh goes on: calls are answered, ticks stay sane."""

    async def story() -> None:
        async with pair() as both:
            both.two.serve("echo", echo)
            both.two.on_raft(1, lambda *_: None)
            for header in headers:
                both.two.message_came("n1", Link.SMALL, header, [memoryview(b"blob")])
                both.one.message_came("n2", Link.SMALL, header, [])
            await asyncio.sleep(0)
            both.session(False)
            both.session(True)
            assert (await both.one.call("n2", "echo", {"x": 1}, timeout_s=5))[0] == {"peer": "n1", "x": 1}
            assert both.hybrids[1].stamp() < tick_from_ms(NOW_MS + 1_000)

    logging.disable(logging.CRITICAL)
    try:
        run(story())
    finally:
        logging.disable(logging.NOTSET)


def test_an_answer_counts_only_from_who_was_asked() -> None:
    """A third node cannot answer a call that another was asked."""

    async def story() -> None:
        async with pair() as both:
            patient = Patient()
            both.two.serve("wait", patient)
            call = asyncio.ensure_future(both.one.call("n2", "wait", {"n": 1}, timeout_s=30))
            await until(lambda: patient.running)
            call_id = next(iter(both.one._outstanding))
            both.one.message_came("n3", Link.SMALL, {"s": int(SANE), "t": "reply", "c": call_id, "a": {"n": 9}}, [])
            patient.go.set()
            assert (await call)[0] == {"n": 1}

    run(story())


def test_stop_ends_everything() -> None:
    """Calls that wait and calls that are served end, and no task is left."""

    async def story() -> None:
        both = Pair()
        await both.one.start()
        await both.two.start()
        both.session(True)
        patient = Patient()
        both.two.serve("wait", patient)
        call = asyncio.ensure_future(both.one.call("n2", "wait", {"n": 1}, timeout_s=30))
        await until(lambda: patient.running)
        await both.two.stop()
        assert patient.cancelled == {1}
        with pytest.raises(PeerUnreachable):
            await call
        await both.one.stop()
        assert asyncio.all_tasks() - {asyncio.current_task()} <= _outer()

    run(story())


def _outer() -> set[asyncio.Task[Any]]:
    """Return the tasks that the test itself runs in."""
    return {task for task in asyncio.all_tasks() if "all_of_it" in repr(task) or "story" in repr(task)
            or "wrapper" in repr(task)}  # fmt: skip


# over real sockets


def meshes(*hosts: Host) -> list[Mesh]:
    clock = FixedClock()
    return [Mesh(host.network, host.name, HybridClock(clock.wall_ms), clock) for host in hosts]


def test_calls_over_sockets() -> None:
    """Many at once on both links with blobs of megabytes, and each caller gets its own answer."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        hosts = Host("n1", addresses), Host("n2", addresses)
        one, two = meshes(*hosts)
        for mesh in (one, two):
            mesh.serve("echo", echo)
            await mesh.start()
        await until(lambda: one.is_up("n2") and two.is_up("n1"))
        big = bytes(range(256)) * 8192

        async def ask(mesh: Mesh, peer: str, n: int) -> None:
            blob = big[n:] if n % 10 == 0 else b"small"
            link = Link.BULK if n % 10 == 0 else Link.SMALL
            answer, blobs = await mesh.call(peer, "echo", {"n": n}, [blob], timeout_s=25, link=link)
            assert answer == {"peer": mesh.me, "n": n} and [bytes(got) for got in blobs] == [blob]

        asks: list[Callable[[int], Any]] = [lambda n: ask(one, "n2", n), lambda n: ask(two, "n1", n)]
        await asyncio.gather(*(asked(n) for n in range(150) for asked in asks))
        await two.stop()
        await until(lambda: not one.is_up("n2"))
        with pytest.raises(PeerUnreachable):
            await one.call("n2", "echo", {}, timeout_s=5)
        await one.stop()

    run(story())


def test_a_killed_peer_ends_calls_over_sockets() -> None:
    """A peer that is gone in the middle of calls fails them, well before their time is up."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        hosts = Host("n1", addresses), Host("n2", addresses)
        one, two = meshes(*hosts)
        patient = Patient()
        two.serve("wait", patient)
        await one.start()
        await two.start()
        await until(lambda: one.is_up("n2"))
        waiting = [asyncio.ensure_future(one.call("n2", "wait", {"n": n}, timeout_s=1_000)) for n in range(9)]
        await until(lambda: len(patient.running) == 9)
        hosts[1].network._links["n1", Link.SMALL].close("killed")
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, PeerUnreachable) for error in errors)
        await until(lambda: len(patient.cancelled) == 9)
        await two.stop()
        await one.stop()

    run(story())


def test_stamps_are_ticks() -> None:
    """The stamp on a frame is a tick of the sender's clock."""

    async def story() -> None:
        async with pair() as both:
            both.one.send_raft(1, "n2", {})
            await asyncio.sleep(0)
            (header,) = both.wires[0].sent
            assert Tick(header["s"]) >= tick_from_ms(NOW_MS)

    run(story())
