"""Who is let in, how long who is not has to wait, and what is written down, on a clock that the tests turn."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import pytest

from cluster.access import (
    ROOT,
    CreateKey,
    CreateRole,
    CreateUser,
    DropUser,
    RevokeKey,
    RotateKey,
    SetGrant,
    SetPassword,
    SetUserRole,
)
from cluster.catalog import CreateAlias
from cluster.message import Message
from node import passwords
from node.audit import Audit
from node.guard import WRONG, Guard, entry_token
from node.scope import Scope
from node.settings import AuthSettings, NodeSettings, Settings
from node.throttle import KNOWN_MAX, Throttle
from node.workers import Lane
from storage.errors import NotPermitted, TooManyAttempts, Unauthenticated
from tests.cluster.controls import Driver, new_collection

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")
COST = 4


class TurnedClock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return int(self.now_s * 1000)


class AtOnce:
    """Does the work at once, and counts it."""

    def __init__(self) -> None:
        self.done = 0

    async def run(self, lane: Lane, function: Callable[[*Arguments], T], *args: *Arguments) -> T:
        self.done += int(getattr(function, "__name__", "") == "matches")
        await asyncio.sleep(0)
        return function(*args)

    def pending(self, lane: Lane) -> int:
        return 0

    async def passed(self, lane: Lane) -> None: ...


class House:
    """A guard in front of a control group driven by hand."""

    def __init__(self, **auth: Any) -> None:
        auth = {"enabled": True, "hash_cost": COST, **auth}
        settings = Settings(node=NodeSettings(), auth=AuthSettings(**auth))
        self.clock, self.executor, self.driver = TurnedClock(), AtOnce(), Driver()
        self.audit = Audit(settings.auth, self.clock)
        control = self.driver.control
        self.guard = Guard(
            settings, self.clock, self.executor, self.audit, lambda: control.access, lambda: control.catalog
        )
        self.delays: list[float] = []

    def say(self, *messages: Message) -> None:
        for message in messages:
            assert self.driver.say(message) == {}, message

    def user(self, name: str, password: str) -> None:
        self.say(CreateUser(name, passwords.make(password, COST), ""))

    async def asks(self, shown: str | None, address: str = "10.0.0.1") -> str:
        """Return the user that is let in, "" if none is; time stands still meanwhile but for what is waited."""
        scope = Scope(0.0)
        try:
            await self.guard.admit(shown, address, scope)
        except Unauthenticated as error:
            assert error.message == WRONG
            return ""
        return scope.who


def run(house: House, script: Coroutine[Any, Any, None], monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = asyncio.sleep

    async def turned(delay_s: float) -> None:
        if delay_s:
            house.delays.append(delay_s)
            house.clock.now_s += delay_s
        await sleep(0)

    monkeypatch.setattr("node.guard.asyncio.sleep", turned)
    asyncio.run(script)


def test_forms_of_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user and its password, as token or as HTTP has them, or an API key; anything else is nobody."""
    house = House()

    async def script() -> None:
        house.user("ann", "pass:word")
        key_id, key, digest = passwords.new_key()
        house.say(CreateKey(key_id, "ann", digest, 0, ""))
        assert await house.asks("Bearer ann:pass:word") == "ann"
        assert await house.asks("Basic YW5uOnBhc3M6d29yZA==") == "ann"
        assert await house.asks(f"Bearer {key}") == "ann"
        assert await house.asks("Bearer root:Milvus") == ROOT
        wrong = ["Bearer ann:password", "Bearer eve:x", f"Bearer {key}x", "Bearer ak-0-x", "ann", "", None, "Basic ?"]
        for index, shown in enumerate([*wrong, "Bearer " + "x" * 5000, "Bearer ann:", "Bearer :"]):
            assert await house.asks(shown, f"10.0.1.{index}") == ""
            house.clock.now_s += 100

    run(house, script(), monkeypatch)


def test_a_proof_is_remembered_until_the_state_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second request costs no work; a changed password, a dropped user and time end that."""
    house = House(cache_s=60.0)

    async def script() -> None:
        house.user("ann", "secret1")
        for _ in range(5):
            assert await house.asks("Bearer ann:secret1") == "ann"
        assert house.executor.done == 1
        house.say(CreateRole("r", ""), SetUserRole("ann", "r", True))
        assert await house.asks("Bearer ann:secret1") == "ann" and house.executor.done == 1
        kept = house.driver.control.access.users["ann"].password
        house.say(SetPassword("ann", passwords.make("secret2", COST), kept, ""))
        assert await house.asks("Bearer ann:secret1") == ""
        assert await house.asks("Bearer ann:secret2", "10.0.0.2") == "ann"
        done = house.executor.done
        house.clock.now_s += 61
        assert await house.asks("Bearer ann:secret2", "10.0.0.2") == "ann" and house.executor.done == done + 1
        house.say(DropUser("ann"))
        assert await house.asks("Bearer ann:secret2", "10.0.0.3") == ""

    run(house, script(), monkeypatch)


def test_connections_that_open_at_once_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred requests with the same credentials cost one look."""
    house = House()

    async def script() -> None:
        house.user("ann", "secret1")
        found = await asyncio.gather(*(house.asks("Bearer ann:secret1") for _ in range(50)))
        assert set(found) == {"ann"} and house.executor.done == 1

    run(house, script(), monkeypatch)


def test_wrong_credentials_cost_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failure is answered later than the one before, whether or not there is such a user, after the same work."""
    delays = {}
    for name in ("ann", "nobody"):
        house = House()

        async def script(house: House = house, name: str = name) -> None:
            house.user("ann", "secret1")
            for _ in range(5):
                assert await house.asks(f"Bearer {name}:wrong") == ""

        run(house, script(), monkeypatch)
        delays[name] = house.delays, house.executor.done
    assert delays["ann"] == delays["nobody"] == ([0.1, 0.2, 0.4, 0.8, 1.6], 5)


def test_who_fails_is_not_looked_at_until_it_may_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """From an address that has failed nothing is looked at for a while; the owner gets in from another one."""
    house = House(delay_s_max=30.0)

    async def script() -> None:
        house.user("ann", "secret1")
        for _ in range(8):
            house.clock.now_s += 20
            assert await house.asks("Bearer ann:wrong") == ""
        done = house.executor.done
        for shown in ("Bearer ann:secret1", "Bearer bob:x", "Bearer ann:wrong"):
            with pytest.raises(TooManyAttempts, match="try again in"):
                await house.asks(shown)
        assert house.executor.done == done
        assert await house.asks("Bearer ann:secret1", "10.0.0.2") == "ann"
        house.clock.now_s += 31
        assert await house.asks("Bearer ann:secret1") == "ann"

    run(house, script(), monkeypatch)


def test_failures_are_remembered_in_bounded_memory() -> None:
    """However many addresses fail, so many are known; after a quarter of an hour one begins anew."""
    clock = TurnedClock()
    throttle = Throttle(clock, 30.0)
    for number in range(KNOWN_MAX + 100):
        throttle.failed(str(number))
    assert len(throttle) == KNOWN_MAX and not throttle.has_failed("0")
    assert [throttle.failed("a") for _ in range(3)] == [0.1, 0.2, 0.4]
    clock.now_s += 1_000
    assert throttle.wait_s("a") == 0 and throttle.failed("a") == 0.1
    for _ in range(50):
        throttle.failed("a")
    assert throttle.wait_s("a") == 30.0
    throttle.succeeded("a")
    assert throttle.wait_s("a") == 0


def test_keys_expire_and_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key is good until its time is up, also if it is remembered; the secret before the last for a while."""
    house = House()

    async def script() -> None:
        house.user("ann", "secret1")
        key_id, old, digest = passwords.new_key()
        house.say(CreateKey(key_id, "ann", digest, house.clock.wall_ms() + 100_000, ""))
        assert await house.asks(f"Bearer {old}") == "ann"
        new, digest = passwords.new_secret(key_id)
        now_ms = house.clock.wall_ms()
        house.say(RotateKey(key_id, digest, now_ms + 100_000, now_ms + 10_000))
        assert await house.asks(f"Bearer {old}") == "ann" and await house.asks(f"Bearer {new}") == "ann"
        house.clock.now_s += 11
        assert await house.asks(f"Bearer {old}", "10.0.0.2") == "" and await house.asks(f"Bearer {new}") == "ann"
        house.clock.now_s += 90
        assert await house.asks(f"Bearer {new}", "10.0.0.3") == ""
        key_id, key, digest = passwords.new_key()
        house.say(CreateKey(key_id, "ann", digest, 0, ""))
        assert await house.asks(f"Bearer {key}") == "ann"
        house.say(RevokeKey(key_id))
        assert await house.asks(f"Bearer {key}", "10.0.0.4") == ""

    run(house, script(), monkeypatch)


def test_objects_are_looked_at_by_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """An alias is worth what its collection is; an id names a collection too; nothing named is everything."""
    house = House()

    async def script() -> None:
        house.user("ann", "secret1")
        house.driver.carry("create_collection", "c", new_collection())
        house.driver.carry("create_collection", "d", new_collection())
        house.say(CreateAlias("default", "d", "c2"), CreateAlias("default", "c", "mine"))
        house.say(CreateRole("r", ""), SetUserRole("ann", "r", True))
        house.say(SetGrant("r", "Collection", "c", "Search", "default", ROOT, True))
        house.say(SetGrant("r", "Collection", "c2", "Search", "default", ROOT, True))
        guard, scope = house.guard, Scope(0.0)
        rights = await guard.admit("Bearer ann:secret1", "")
        guard.check(rights, "Search", scope, "default", ["c"])
        guard.check(rights, "Search", scope, "default", ["mine"])
        guard.check(rights, "Search", scope, "default", collection_ids=[house.driver.find("c").collection_id])
        guard.check(rights, "UpdateUser", scope, "", users=["ann"])
        for refused in (
            {"names": ["d"]},
            {"names": ["c2"]},
            {"names": ["c", "d"]},
            {"collection_ids": [house.driver.find("d").collection_id]},
            {"collection_ids": [1]},
            {},
        ):
            with pytest.raises(NotPermitted, match="PrivilegeSearch"):
                guard.check(rights, "Search", scope, "default", **refused)
        with pytest.raises(NotPermitted):
            guard.check(rights, "Search", scope, "other", ["c"])
        with pytest.raises(NotPermitted):
            guard.check(rights, "UpdateUser", scope, "", users=["root"])
        with pytest.raises(NotPermitted):
            guard.check(rights, "?", scope, "default", ["c"])

    run(house, script(), monkeypatch)


def test_newcomers_show_what_follows_from_the_secret() -> None:
    """A node that joins shows a text that follows from the cluster's secret and does not give it away."""
    secret = "0123456789abcdef"
    token = entry_token(secret)
    assert secret not in token and token != entry_token(secret + "x") and entry_token("") == ""
    assert not House().guard.is_newcomer("") and not House().guard.is_newcomer(None)


def test_the_audit_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes and refusals are lines of JSON without a secret; the file is its owner's, and followed by others."""
    path = tmp_path / "audit.jsonl"
    house = House(audit_file=str(path), audit_bytes_max=4096, audit_files_max=2)

    async def script() -> None:
        house.user("ann", "s3cr3t-pass")
        scope = Scope(0.0)
        await house.guard.admit("Bearer ann:s3cr3t-pass", "10.0.0.9", scope)
        with pytest.raises(NotPermitted):
            house.guard.check(
                None if scope.sees is None else house.driver.control.access.rights("ann"),
                "DropCollection",
                scope,
                "default",
                ["c\nd"],
            )
        house.guard.note("/collections/drop", "DropCollection", scope, "10.0.0.9", 1401, "r-1")
        house.guard.note("/entities/search", "Search", scope, "10.0.0.9", 0)
        wrong = Scope(0.0)
        with pytest.raises(Unauthenticated):
            await house.guard.admit("Bearer ann:s3cr3t-wrong", "10.0.0.9", wrong)
        house.guard.note("/entities/search", "Search", wrong, "10.0.0.9", 1800)
        text = path.read_text()
        assert "s3cr3t" not in text and path.stat().st_mode & 0o077 == 0
        first, second = map(json.loads, text.splitlines())
        assert (first["who"], first["operation"], first["objects"], first["outcome"], first["address"]) == (
            "ann", "/collections/drop", ["c\nd"], "refused", "10.0.0.9",
        )  # fmt: skip
        assert (second["who"], second["outcome"], second["code"]) == ("ann", "refused", 1800)
        for _ in range(200):
            house.guard.note("/collections/create", "CreateCollection", scope, "10.0.0.9", 0)

    run(house, script(), monkeypatch)
    assert len(list(tmp_path.iterdir())) == 3 and all(one.stat().st_size <= 4096 for one in tmp_path.iterdir())
    house.audit.close()


def test_what_is_kept_of_a_password() -> None:
    """It is another text each time, of which only the password is right; damaged ones match nothing."""
    kept = passwords.make("secret1", COST)
    assert passwords.matches("secret1", kept) and not passwords.matches("secret2", kept)
    assert kept != passwords.make("secret1", COST) and "secret1" not in kept
    assert not any(passwords.matches("x", one) for one in ("", "scrypt$4$x$y", "scrypt$99$$", "md5$1$2$3", "$$$"))
