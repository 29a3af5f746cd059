"""The simulated network breaks what real ones break, and nothing that TCP keeps."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from node.network import Link
from tests.sim.network import SILENCE_S, SimNetwork, SimWire
from tests.sim.world import Life, SimLoop, close, run

NAMES = ("a", "b", "c")


class Talker:
    """A process that numbers what it sends and checks what it gets."""

    def __init__(self, loop: SimLoop, wire: SimWire, name: str) -> None:
        self.life = Life(loop, name)
        self.name = name
        self.network = SimNetwork(wire, name, self.life)
        self.sessions: Counter[str] = Counter()
        self.bulk: Counter[str] = Counter()
        self.up: set[str] = set()
        self.sent: Counter[tuple[object, ...]] = Counter()
        self.expected: dict[tuple[str, Link], tuple[list[int], int]] = {}
        self.heard: Counter[str] = Counter()
        self.life.start(self.network.start(self))

    def talk(self, peer: str, link: Link, size: int) -> bool:
        where = (peer, link, self.sessions[peer], self.bulk[peer] if link is Link.BULK else 0)
        number = self.sent[where]
        header = {"where": list(where[2:]), "number": number, "size": size}
        done = self.network.send(peer, link, header, [bytes(size), b"", b"x"])
        self.sent[where] += done
        return done

    def on_session(self, peer: str, up: bool) -> None:
        assert up != (peer in self.up), "ups and downs alternate"
        assert self.network.is_up(peer) == up
        self.sessions[peer] += up
        (self.up.add if up else self.up.discard)(peer)
        for link in Link:
            self.expected.pop((peer, link), None)

    def on_bulk_lost(self, peer: str) -> None:
        assert peer in self.up
        self.bulk[peer] += 1
        self.expected.pop((peer, Link.BULK), None)

    def on_message(self, peer: str, link: Link, header: dict[str, Any], blobs: Sequence[memoryview]) -> None:
        assert peer in self.up and [len(one) for one in blobs] == [header["size"], 0, 1]
        where, number = self.expected.get((peer, link), (header["where"], 0))
        assert (header["where"], header["number"]) == (where, number), "in order, once, no gap, of one session"
        self.expected[peer, link] = (where, number + 1)
        self.heard[peer] += 1


@pytest.mark.parametrize("seed", range(8))
def test_frames_of_a_session_arrive_in_order_up_to_its_end(seed: int) -> None:
    """Whatever breaks: within a session each frame comes once and in order, and none of another session."""
    loop, rng = SimLoop(), Random(seed)
    wire = SimWire(loop, Random(seed + 1))

    async def main() -> None:
        talkers = {name: Talker(loop, wire, name) for name in NAMES}
        for _ in range(3_000):
            a, b = rng.sample(NAMES, 2)
            what = rng.random()
            if what < 0.9:
                talkers[a].talk(b, rng.choice(list(Link)), rng.choice((0, 100, 300_000)))
            elif what < 0.92:
                wire.cut(a, b)
            elif what < 0.94:
                wire.mend()
            elif what < 0.95:
                wire.reset(a, b)
            elif what < 0.96:
                wire.reset_bulk(a, b)
            elif what < 0.97:
                wire.path(a, b).bytes_per_s, wire.path(a, b).delay_s = 1e6, 0.2
            elif what < 0.98:
                life = talkers[a].life
                (life.resume if life.paused else life.pause)()
            elif what < 0.985:
                talkers[a].life.end()
                wire.leave(talkers[a].network, silently=rng.random() < 0.5)
                talkers[a] = Talker(loop, wire, a)
            await asyncio.sleep(rng.expovariate(30))
        wire.mend()
        for one in talkers.values():
            one.life.resume()
        await asyncio.sleep(3 * SILENCE_S)
        for name, one in talkers.items():
            assert one.up == set(NAMES) - {name}, "sessions come back"
        before = [talkers[a].heard.copy() for a in NAMES]
        assert all(talkers[a].talk(b, link, 10) for a in NAMES for b in NAMES if a != b for link in Link)
        await asyncio.sleep(1.0)
        after = [talkers[a].heard for a in NAMES]
        assert all(now - then == dict.fromkeys(now, 2) for then, now in zip(before, after, strict=True))

    try:
        run(loop, main())
        assert wire.delivered > 300 and wire.lost > 20
    finally:
        close(loop)


@pytest.mark.parametrize("mended", [True, False])
def test_a_cut_keeps_frames_until_the_session_ends(mended: bool) -> None:
    """One way is cut: a short cut only delays, as TCP sends again; a long one ends the session at both ends."""
    loop = SimLoop()
    wire = SimWire(loop, Random(1))

    async def main() -> None:
        a, b = Talker(loop, wire, "a"), Talker(loop, wire, "b")
        await asyncio.sleep(1.0)
        wire.cut("a", "b")
        assert a.talk("b", Link.SMALL, 10) and b.talk("a", Link.SMALL, 10)
        await asyncio.sleep(SILENCE_S / 2 if mended else 2 * SILENCE_S)
        assert (a.heard["b"], b.heard["a"]) == (1, 0)
        assert a.up == ({"b"} if mended else set())
        wire.mend()
        await asyncio.sleep(1.0)
        assert b.heard["a"] == (1 if mended else 0)
        assert a.up == {"b"} and a.sessions["b"] == (1 if mended else 2)

    try:
        run(loop, main())
    finally:
        close(loop)


def test_sessions_are_with_those_that_know_each_other() -> None:
    """Who is no peer any more loses its session, at both ends, and gets none until both know each other again."""
    loop = SimLoop()
    wire = SimWire(loop, Random(1))

    async def main() -> None:
        talkers = {name: Talker(loop, wire, name) for name in NAMES}
        a, b, c = talkers.values()
        await asyncio.sleep(1.0)
        a.network.set_peers({"b": []})
        await asyncio.sleep(2.0)
        assert (a.up, b.up, c.up) == ({"b"}, {"a", "c"}, {"b"})
        a.network.set_peers({"b": [], "c": []})
        c.network.set_peers({"a": []})
        await asyncio.sleep(2.0)
        assert (a.up, b.up, c.up) == ({"b", "c"}, {"a"}, {"a"})

    try:
        run(loop, main())
    finally:
        close(loop)
