"""The peer network over real sockets: sessions, order, bounds, and who is kept out."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import resource
import socket
from typing import Any

import pytest

from node import peer_link, peers
from node.handshake import Proven, Refused, Verdict
from node.network import FrameKind, Link, encode_message, encode_signal
from node.settings import Address
from tests.node.peer_pair import INCARNATION, SECRET, Host, Stranger, free_addresses, run, until


@pytest.mark.parametrize("slice_s", [peer_link.SLICE_S, 0.0])
def test_frames_arrive_in_order_on_both_links(slice_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions, small and bulk, blobs of all sizes, the same as they were sent, however they are sliced."""
    monkeypatch.setattr(peer_link, "SLICE_S", slice_s)
    dice = random.Random(7)

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n1", addresses) as one, Host("n2", addresses) as two:
            await one.meets("n2")
            await two.meets("n1")
            sent: dict[tuple[str, Link], list[tuple[Any, list[bytes]]]] = {
                (name, link): [] for name in addresses for link in Link
            }
            for number in range(300):
                host, peer = dice.choice([(one, "n2"), (two, "n1")])
                link = dice.choice(list(Link))
                size = dice.choice([0, 1, 99, 5_000, 70_000, 1_500_000 if number % 20 == 0 else 10])
                blobs = [dice.randbytes(size) for _ in range(dice.randrange(3))]
                assert host.send(peer, number, blobs, link)
                sent[host.name, link].append((number, blobs))

            def got(host: Host) -> dict[Link, list[tuple[Any, list[bytes]]]]:
                heard = host.diary.messages
                return {link: [(h["n"], blobs) for _, via, h, blobs in heard if via is link and h["n"] != "hello"]
                        for link in Link}  # fmt: skip

            await until(lambda: sum(len(some) for host in (one, two) for some in got(host).values()) == 300)
            for host, peer in ((one, "n2"), (two, "n1")):
                assert got(host) == {link: sent[peer, link] for link in Link}
            assert one.metrics.registry.get_sample_value("annulus_peer_sessions", {"peer": "n2"}) == 1

    run(story())


def test_three_nodes_have_a_session_each() -> None:
    """Of each pair one dials; whoever starts last finds the others."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2", "n3")
        async with Host("n3", addresses) as three, Host("n1", addresses) as one, Host("n2", addresses) as two:
            for host in (one, two, three):
                for peer in addresses:
                    if peer != host.name:
                        await host.meets(peer)
            assert [state.is_up for state in one.network.states()] == [True, True]
            assert not one.network.send("n1", Link.SMALL, {}) and not one.network.send("n9", Link.SMALL, {})

    run(story())


@pytest.mark.parametrize("restarted", ["n1", "n2"])
def test_a_restarted_node_is_a_new_session(restarted: str) -> None:
    """The old session ends before the new one begins, and nothing of the old one comes after."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        stays = "n2" if restarted == "n1" else "n1"
        async with Host(stays, addresses) as host:
            numbers = 0
            for round_ in range(3):
                async with Host(restarted, addresses) as other:
                    await other.meets(stays)
                    await host.meets(restarted)
                    for _ in range(200):
                        numbers += 1
                        other.send(stays, numbers, [b"x" * 5_000])
                await until(lambda: not host.network.is_up(restarted))
                assert round_ or host.network.states()[0].trouble
            entries = [entry[1] for entry in host.diary.entries if entry[1] not in ("hello", "bulk lost")]
        sessions: list[list[Any]] = []
        for entry in entries:
            if entry is True:
                sessions.append([])
            elif entry is not False:
                sessions[-1].append(entry)
        assert [entry for entry in entries if isinstance(entry, bool)] == [True, False] * 3
        for number, session in enumerate(sessions):
            assert session == list(range(number * 200 + 1, number * 200 + 1 + len(session)))

    run(story())


def test_a_broken_connection_heals() -> None:
    """Whoever of the two loses the connection, the session ends on both sides and comes back by itself."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n1", addresses) as one, Host("n2", addresses) as two:
            for victim in (one, two):
                await one.meets("n2")
                await two.meets("n1")
                for host in (one, two):
                    host.diary.entries.clear()
                peer = "n2" if victim is one else "n1"
                victim.network._links[peer, Link.SMALL]._transport.abort()  # type: ignore[union-attr]
                await until(lambda: all((h, up) in one.diary.entries + two.diary.entries
                                        for h in ("n1", "n2") for up in (False, True)))  # fmt: skip
            await one.meets("n2")

    run(story())


def test_the_bulk_link_breaks_alone() -> None:
    """The session goes on, its receiver is told, and the link comes back."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n1", addresses) as one, Host("n2", addresses) as two:
            await one.meets("n2")
            await two.meets("n1")
            one.network._links["n2", Link.BULK]._transport.abort()  # type: ignore[union-attr]
            await until(lambda: ("n2", "bulk lost") in one.diary.entries and ("n1", "bulk lost") in two.diary.entries)
            await one.meets("n2")
            assert ("n2", False) not in one.diary.entries and ("n1", False) not in two.diary.entries

    run(story())


def test_a_queue_is_bounded_and_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that takes nothing makes `send` say no; once it takes again, what was accepted arrives."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n1", addresses) as one, Host("n2", addresses) as two:
            await one.meets("n2")
            connection = two.network._links["n1", Link.BULK]
            assert connection._transport is not None
            connection._transport.pause_reading()
            blob, accepted = os.urandom(1 << 20), 0
            while one.send("n2", accepted, [blob], Link.BULK):
                accepted += 1
                assert one.network.queued_bytes("n2", Link.BULK) < peer_link.QUEUE_BYTES_MAX[Link.BULK] + (3 << 20)
                await asyncio.sleep(0)
            assert accepted >= 32
            assert one.send("n2", -1)  # the other link is free
            connection._transport.resume_reading()
            await until(lambda: [m[2]["n"] for m in two.diary.messages if m[3]] == list(range(accepted)))
            assert one.network.queued_bytes("n2", Link.BULK) == 0

    run(story())


# who is kept out


@pytest.mark.parametrize(
    ("claims", "verdict"),
    [
        pytest.param({"secret": "a wrong secret"}, Verdict.PROOF, id="wrong-secret"),
        pytest.param({"secret": ""}, Verdict.PROOF, id="no-secret"),
        pytest.param({"cluster": "d"}, Verdict.CLUSTER, id="wrong-cluster"),
        pytest.param({"name": "n9"}, Verdict.NAME, id="unknown-name"),
        pytest.param({"name": "n3"}, Verdict.NAME, id="one-that-should-be-dialled"),
        pytest.param({"name": "n2"}, Verdict.NAME, id="our-own-name"),
        pytest.param({"to": "n1"}, Verdict.ADDRESS, id="for-another"),
        pytest.param({"link": Link.BULK}, Verdict.NO_SESSION, id="bulk-first"),
    ],
)
def test_strangers_get_no_session(claims: dict[str, Any], verdict: Verdict, caplog: pytest.LogCaptureFixture) -> None:
    """Each is told why, counted under its reason, logged once, and its frames reach nobody.

    A bulk link without a session is only counted: it is usual where a session ends and another begins.
    """

    async def story() -> None:
        addresses = free_addresses("n1", "n2", "n3")
        async with Host("n2", addresses) as host:
            for _ in range(3):
                stranger = await Stranger.connect(addresses["n2"])
                outcome = await stranger.pose_as(**{"name": "n1", "to": "n2", **claims})
                assert isinstance(outcome, Refused) and outcome.verdict is verdict
                stranger.send({"n": 1})
                assert await stranger.is_closed()
                await stranger.leave()
            await until(lambda: host.refused(verdict.label) == 3)
            assert host.diary.entries == []

    with caplog.at_level(logging.INFO):
        run(story())
    lines = [record.getMessage() for record in caplog.records if f"reason={verdict.label}" in record.getMessage()]
    assert len(lines) == (verdict is not Verdict.NO_SESSION)
    assert SECRET not in caplog.text


def test_a_replayed_conversation_is_refused() -> None:
    """What a node said to open its session opens none for whoever recorded it."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n2", addresses) as host:
            node = await Stranger.connect(addresses["n2"])
            assert isinstance(await node.pose_as("n1", "n2"), Proven)
            await node.leave()
            await until(lambda: ("n1", False) in host.diary.entries)
            thief = await Stranger.connect(addresses["n2"])
            thief.say(node.said)
            assert await thief.is_closed()
            assert host.refused(Verdict.PROOF.label) == 1 and host.diary.entries == [("n1", True), ("n1", False)]

    run(story())


def test_a_false_acceptor_gets_nothing() -> None:
    """A dialer sends no frame to whoever answers at the peer's address without the secret."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n1", addresses) as host, Host("n2", addresses, secret="a wrong secret"):
            await until(lambda: host.refused(Verdict.PROOF.label) >= 2)
            assert not host.network.is_up("n2") and not host.send("n2", 1)
            assert "cluster_secret" in host.network.states()[0].trouble

    run(story())


GOOD = b"".join(encode_message({"n": 1}, [b"blob" * 9]))


@pytest.mark.parametrize(
    ("garbage", "reason"),
    [
        pytest.param(b"\0" * 64, "damaged", id="zeros"),
        pytest.param(os.urandom(4096), "damaged", id="noise"),
        pytest.param(GOOD[:40] + bytes([GOOD[40] ^ 4]) + GOOD[41:], "damaged", id="bit-flip-in-body"),
        pytest.param(GOOD[:6] + bytes([GOOD[6] ^ 4]) + GOOD[7:], "damaged", id="bit-flip-in-length"),
    ],
)
def test_a_peer_that_sends_garbage_is_cut_off(garbage: bytes, reason: str) -> None:
    """What came before is delivered, the session ends, and the reason is counted; a new session is welcome."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n2", addresses) as host:
            for number in range(2):
                peer = await Stranger.connect(addresses["n2"])
                assert isinstance(await peer.pose_as("n1", "n2"), Proven)
                peer.say(GOOD + garbage + GOOD)
                assert await peer.is_closed()
                assert host.refused(reason) == number + 1
                await peer.leave()
            assert host.diary.entries == [("n1", True), ("n1", 1), ("n1", False)] * 2

    run(story())


def test_hellos_have_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte by byte or not at all, whoever has not proved itself in time is closed."""
    monkeypatch.setattr(peers, "HELLO_S_MAX", 0.4)

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n2", addresses) as host:
            silent, slow = await Stranger.connect(addresses["n2"]), await Stranger.connect(addresses["n2"])

            async def drip() -> None:
                while True:
                    slow.say(b"a")
                    await asyncio.sleep(0.05)

            dripping = asyncio.get_running_loop().create_task(drip())
            assert await silent.is_closed() and await slow.is_closed()
            dripping.cancel()
            await until(lambda: host.refused("hello_timeout") == 2)

    run(story())


def test_unproven_connections_are_few() -> None:
    """The oldest go when there are too many; a node gets in all the same, and a session is not disturbed."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2", "n3")
        async with Host("n1", addresses) as one, Host("n3", addresses) as host:
            await one.meets("n3")
            for _ in range(3 * peers.UNPROVEN_MAX):
                await Stranger.connect(addresses["n3"])
            await until(lambda: host.refused("crowded") >= 2 * peers.UNPROVEN_MAX)
            assert len(host.network._unproven) <= peers.UNPROVEN_MAX
            async with Host("n2", addresses) as two:
                await two.meets("n3")
            assert one.network.is_up("n3") and ("n1", False) not in host.diary.entries

    run(story())


def test_noise_at_the_port_does_no_harm() -> None:
    """Seconds of random bytes from many connections: the process is alive, its memory bounded, its session unhurt."""
    dice = random.Random(3)

    async def noise(address: Address) -> None:
        for _ in range(60):
            stranger = await Stranger.connect(address)
            start = dice.choice([b"", b"annulus\0", b"annulus\0\1\0\0\0", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01"])
            try:
                stranger.say(start + dice.randbytes(dice.choice([0, 1, 200, 244, 100_000])))
                await stranger.writer.drain()
            except ConnectionError:
                pass
            if dice.random() < 0.5:
                await asyncio.sleep(0.005)
            await stranger.leave()

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n1", addresses) as one, Host("n2", addresses) as two:
            await one.meets("n2")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for place in addresses.values():
                await asyncio.gather(*(noise(place) for _ in range(8)))
            assert one.network.is_up("n2") and two.network.is_up("n1")
            assert ("n1", False) not in two.diary.entries
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
            assert one.send("n2", 5)
            await until(lambda: ("n1", 5) in two.diary.entries)

    run(story())


# the silent and the doubled


def test_a_silent_peer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that neither reads nor writes, its connection open, loses its session."""
    monkeypatch.setattr(peer_link, "PING_S", 0.2)
    monkeypatch.setattr(peer_link, "DEAD_S", 0.6)

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n2", addresses) as host:
            peer = await Stranger.connect(addresses["n2"])
            assert isinstance(await peer.pose_as("n1", "n2"), Proven)
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await until(lambda: host.diary.entries == [("n1", True), ("n1", False)])
            assert "nothing was heard" in host.network.states()[0].trouble
            await peer.leave()

    run(story())


def test_idle_sessions_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings are answered, so two nodes with nothing to say stay together, and know their round trip."""
    monkeypatch.setattr(peer_link, "PING_S", 0.1)
    monkeypatch.setattr(peer_link, "DEAD_S", 0.6)
    monkeypatch.setattr(peers, "LOOK_S", 0.05)

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n1", addresses) as one, Host("n2", addresses) as two:
            await one.meets("n2")
            await two.meets("n1")
            await asyncio.sleep(1.5)
            for host in (one, two):
                assert [entry for entry in host.diary.entries if isinstance(entry[1], bool)] == [host.diary.entries[0]]
                (state,) = host.network.states()
                assert state.is_up and state.round_trip_s is not None and state.round_trip_s < 0.6

    run(story())


def test_a_peer_that_takes_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that talks but never reads is cut off: what waits for it would wait for ever."""
    monkeypatch.setattr(peer_link, "STUCK_S", 0.5)

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n2", addresses) as host:
            peer = await Stranger.connect(addresses["n2"])
            assert isinstance(await peer.pose_as("n1", "n2"), Proven)
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await until(lambda: not host.send("n1", 0, [bytes(1 << 20)]))
            while host.network.is_up("n1"):
                peer.writer.write(encode_signal(FrameKind.PING, b"12345678"))
                await asyncio.sleep(0.05)
            assert "it took nothing" in host.network.states()[0].trouble
            await peer.leave()

    run(story())


def test_of_two_processes_with_one_name_the_first_stays(caplog: pytest.LogCaptureFixture) -> None:
    """While the first answers, the second is refused, and a person is told; the first's session goes on."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n1", addresses) as first, Host("n2", addresses) as host:
            await first.meets("n2")
            elsewhere = {**addresses, **free_addresses("n1")}
            async with Host("n1", elsewhere) as second:
                await until(lambda: host.refused("duplicate_name") >= 1 and second.refused("hello_duplicate") >= 2)
                assert not second.network.is_up("n2")
                assert "started twice" in second.network.states()[0].trouble
                assert first.send("n2", 7)
                await until(lambda: ("n1", 7) in host.diary.entries)
            assert ("n1", False) not in host.diary.entries

    run(story())
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and "two processes claim to be one node peer=n1" in errors[0]


def test_a_process_that_does_not_answer_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a reset of its machine the other side still has the old connection: the new process gets in soon."""
    monkeypatch.setattr(peer_link, "CHALLENGE_S", 0.3)
    monkeypatch.setattr(peer_link, "DEAD_S", 60.0)

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n2", addresses) as host:
            ghost = await Stranger.connect(addresses["n2"])
            assert isinstance(await ghost.pose_as("n1", "n2"), Proven)
            async with Host("n1", addresses) as again:
                await again.meets("n2")
                assert host.diary.entries[:3] == [("n1", True), ("n1", False), ("n1", True)]
                assert host.refused("duplicate_name") == 0

    run(story())


def test_a_process_may_begin_anew() -> None:
    """The same process, having lost its connection before we noticed, replaces its session; bulk belongs to it."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n2", addresses) as host:
            for _ in range(2):
                peer, bulk = await Stranger.connect(addresses["n2"]), await Stranger.connect(addresses["n2"])
                assert isinstance(await peer.pose_as("n1", "n2"), Proven)
                other = await bulk.pose_as("n1", "n2", link=Link.BULK, incarnation=INCARNATION[::-1])
                assert isinstance(other, Refused) and other.verdict is Verdict.NO_SESSION
                await bulk.leave()
                bulk = await Stranger.connect(addresses["n2"])
                assert isinstance(await bulk.pose_as("n1", "n2", link=Link.BULK), Proven)
            assert host.diary.entries == [("n1", True), ("n1", False), ("n1", True)]

    run(story())


# the start


def test_a_taken_address_is_said_plainly() -> None:
    """Two nodes on one port: the second does not start, and the error says what to do."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n1", addresses):
            second = Host("n2", addresses, listen=addresses["n1"])
            with pytest.raises(OSError, match=r"another node or program has it; stop what uses it, or give"):
                await second.network.start(second.diary)
            await second.network.stop()

    run(story())


@pytest.mark.parametrize("open_one", ["10.0.0.1", "0.0.0.0", "example.org", "::"])
def test_nodes_that_others_reach_need_proof(open_one: str) -> None:
    """Without secret and TLS only this machine's addresses are accepted, for listening as for dialling."""
    here, there = Address("127.0.0.1", 1), Address(open_one, 1)
    for addresses, listen in (({"n1": here, "n2": there}, here), ({"n1": here, "n2": here}, there)):
        with pytest.raises(OSError, match="cluster_secret"):
            Host("n1", addresses, listen=listen, secret="")
        Host("n1", addresses, listen=listen, secret=SECRET)


def test_without_proof_on_loopback_there_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """It works, for a try-out, and says what that means."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n1", addresses, secret="") as one, Host("n2", addresses, secret=""):
            await one.meets("n2")

    run(story())
    assert "any process of this machine can pose as one" in caplog.text


def test_an_address_that_cannot_be_listened_on() -> None:
    """An address of another machine is refused at the start, by name."""
    host = Host("n1", {"n1": Address("192.0.2.1", 7)}, secret=SECRET)
    with pytest.raises(OSError, match=r"192\.0\.2\.1:7, where this node is to listen for other nodes"):
        host.network.bind()


def test_all_sockets_are_closed_by_stop() -> None:
    """After stop nobody listens, and strangers in their handshake are gone."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2")
        async with Host("n2", addresses):
            strangers = [await Stranger.connect(addresses["n2"]) for _ in range(3)]
            await asyncio.sleep(0.1)
        assert all([await stranger.is_closed() for stranger in strangers])
        with pytest.raises(OSError), socket.socket() as probe:
            probe.settimeout(1)
            probe.connect(tuple(addresses["n2"]))

    run(story())


def test_peers_come_and_go_while_it_runs() -> None:
    """A node that is named gets a session; one that no longer is loses it at both ends, and is kept out."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2", "n3")
        two_of_them = {name: addresses[name] for name in ("n1", "n2")}
        async with Host("n1", two_of_them) as one, Host("n2", two_of_them) as two, Host("n3", addresses) as three:
            await one.meets("n2")
            assert not one.network.is_up("n3") and not three.network.is_up("n1")
            everybody = {name: [address] for name, address in addresses.items()}
            one.network.set_peers(everybody)
            two.network.set_peers(everybody)
            for host in (one, two):
                await host.meets("n3")
                await three.meets(host.name)
            assert one.diary.entries.count(("n2", True)) == 1, "who stays has the session that it had"
            one.network.set_peers({name: [address] for name, address in two_of_them.items()})
            await until(lambda: ("n1", False) in three.diary.entries)
            assert ("n3", False) in one.diary.entries and not one.network.is_up("n3")
            assert not one.network.send("n3", Link.SMALL, {})
            two.network.set_peers({"n1": [addresses["n1"]]})
            await until(lambda: two.refused("hello_name") or not three.network.is_up("n2"))
            assert [state.name for state in two.network.states()] == ["n1"]
            assert one.network.is_up("n2") and two.network.is_up("n1")
            assert two.metrics.registry.get_sample_value("annulus_peer_sessions", {"peer": "n3"}) is None

    run(story())


def test_a_peer_is_found_at_any_of_its_addresses() -> None:
    """What is known of a node may be old: the dialer tries all, and goes to the one that was right first."""

    async def story() -> None:
        addresses = free_addresses("n1", "n2", "old")
        async with Host("n1", {"n1": addresses["n1"], "n2": addresses["old"]}) as one, Host("n2", addresses) as two:
            one.network.set_peers({"n2": [addresses["old"], addresses["n2"]]})
            await one.meets("n2")
            await two.network.stop()
            await until(lambda: not one.network.is_up("n2"))
            async with Host("n2", addresses):
                await one.meets("n2")

    run(story())


def test_a_peer_that_anybody_may_pose_as_is_not_taken() -> None:
    """Without secret and TLS no address of another machine becomes a peer's."""

    async def story() -> None:
        addresses = free_addresses("n1")
        async with Host("n1", addresses, secret="") as one:
            one.network.set_peers({"n2": [Address("10.0.0.2", 1)]})
            assert one.network.states() == [] and one.refused("unproved") == 1

    run(story())
