"""The guard in front of both interfaces: who asks, whether it may, and a line in the audit log.

With authentication on, a request goes through `admit` before its body is looked at and through `check` when its names
are known. What was proved once is remembered under a keyed digest of the credentials, so that the next request costs
some microseconds; what is remembered is good only as long as the state of the control group on this node says the same:
a changed password or a dropped user counts with the entry that says so. What nodes ask each other does not come by
here: they prove themselves to each other (`node/handshake.py`), and who asks first has checked.

Wrong credentials are all answered alike, after the same work and a delay that doubles; see `node/throttle.py`. A user
that others guess at is slowed only where somebody has failed before: at an address that has not, the owner gets in.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from base64 import b64decode
from binascii import Error as Base64Error
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

from cluster.access import ROOT, Access, Rights
from cluster.catalog import Catalog
from cluster.privileges import ANY
from node import passwords
from node.audit import Audit
from node.clock import Clock
from node.rules import ANYONE, OPEN, UNLISTED, is_about_users, is_audited
from node.scope import Scope
from node.settings import Settings
from node.throttle import Throttle
from node.workers import Executor, Lane
from storage.errors import NoLeader, NotPermitted, Overloaded, TooManyAttempts, Unauthenticated
from storage.types import CollectionId

log = logging.getLogger(__name__)

REMEMBERED_MAX: Final = 10_000
WAITING_MAX: Final = 64
"""Credentials that may wait for their turn to be looked at."""
DELAYED_MAX: Final = 512
"""Answers to wrong credentials that may be held back at the same time."""
ANSWER_DELAY_S_MAX: Final = 3.0
CREDENTIALS_CHARS_MAX: Final = 1_024
WELL_KNOWN: Final = "Milvus"
REMIND_S: Final = 3_600.0
WRONG: Final = "user hasn't authenticated: missing or wrong credentials"
_NOBODY: Final = "(nobody)"


@dataclass
class _Proven:
    """Credentials that were right."""

    name: str
    kept: str
    """What the user's password or the key's digest was."""
    key_id: str
    until_s: float
    expires_ms: int
    version: int
    rights: Rights


class Guard:
    """One per node. `access` and `catalog` return the state as it is now, None while the node has none."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        executor: Executor,
        audit: Audit,
        access: Callable[[], Access | None],
        catalog: Callable[[], Catalog],
    ) -> None:
        self.is_on = settings.auth.enabled
        self.audit = audit
        self._settings = settings.auth
        self._entry = entry_token(settings.node.cluster_secret)
        self._clock = clock
        self._executor = executor
        self._access = access
        self._catalog = catalog
        self._fingerprint_key = secrets.token_bytes(32)
        self._proven: OrderedDict[bytes, _Proven] = OrderedDict()
        self._looking: dict[bytes, asyncio.Task[_Proven | None]] = {}
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._delayed = 0
        self._users = Throttle(clock, settings.auth.delay_s_max)
        self._addresses = Throttle(clock, settings.auth.delay_s_max)
        self._decoy = ""
        self._initial = ""
        """What is kept of the password that root has before it is changed."""
        self._reminded_s = -REMIND_S

    # who

    async def admit(self, shown: str | None, address: str, scope: Scope | None = None) -> Rights | None:
        """Return what the one who shows these credentials may do; None while authentication is off.

        address  where it comes from, "" if that is not known

        Raises Unauthenticated, TooManyAttempts, Overloaded.
        """
        if not self.is_on:
            return None
        if not shown or len(shown) > CREDENTIALS_CHARS_MAX:
            if scope is not None:
                scope.who = _NOBODY
            raise Unauthenticated(WRONG)
        fingerprint = blake2b(shown.encode("utf-8", "surroguardpass"), key=self._fingerprint_key, digest_size=16)
        proven = self._remembered(fingerprint.digest())
        if proven is None:
            proven = await self._prove(fingerprint.digest(), shown, address, scope)
        if scope is not None:
            scope.who, scope.sees = proven.name, None if proven.rights.is_super else proven.rights.sees
        return proven.rights

    def is_newcomer(self, shown: str | None) -> bool:
        """Return whether this is what a node that wants to join shows, to be told where."""
        return bool(self._entry and shown) and hmac.compare_digest(str(shown).encode(), self._entry.encode())

    def _state(self) -> Access:
        found = self._access()
        if found is None:
            raise NoLeader("this node does not know yet who its users are: try again soon")
        return found

    def _remembered(self, fingerprint: bytes) -> _Proven | None:
        found = self._proven.get(fingerprint)
        if found is None:
            return None
        access = self._state()
        if found.version != access.version:
            rights = access.rights(found.name)
            if rights is None or not self._still(found, access):
                del self._proven[fingerprint]
                return None
            found.version, found.rights = access.version, rights
        if self._clock.monotonic_s() >= found.until_s or 0 < found.expires_ms <= self._clock.wall_ms():
            del self._proven[fingerprint]
            return None
        return found

    def _still(self, proven: _Proven, access: Access) -> bool:
        """Return whether credentials that were right are so in this state."""
        if not proven.key_id:
            return self._kept(access, proven.name) == proven.kept
        key = access.keys.get(proven.key_id)
        return key is not None and key.user == proven.name and key.digest == proven.kept

    def _kept(self, access: Access, name: str) -> str:
        user = access.users.get(name)
        if user is not None:
            return user.password
        return self._initial if name == ROOT else ""

    async def _prove(self, fingerprint: bytes, shown: str, address: str, scope: Scope | None) -> _Proven:
        text = plain(shown)
        user, colon, password = text.partition(":")
        key_id, secret = ("", "") if colon else passwords.split_key(text)
        who = f"u{user[:64]}" if colon else f"k{key_id[:64]}"
        if scope is not None:
            scope.who = user if colon else f"key {key_id}" if key_id else _NOBODY
        self._check_turn(who, address)
        if self._waiting >= WAITING_MAX:
            raise Overloaded("too many are being looked at: try again soon")
        looking = self._looking.get(fingerprint)
        if looking is None:  # many connections open at once with the same credentials: they are looked at once
            work = self._look(user, password, who, address) if colon else self._look_key(key_id, secret)
            looking = self._looking[fingerprint] = asyncio.get_running_loop().create_task(work)
            looking.add_done_callback(lambda done: self._looked(fingerprint, done))
        self._waiting += 1
        try:
            proven = await asyncio.shield(looking)
        finally:
            self._waiting -= 1
        if proven is None:
            await self._refuse(who, address)
            raise Unauthenticated(WRONG)
        self._users.succeeded(who)  # but not the address: an account of one's own would clear it to guess at others'
        return proven

    def _check_turn(self, who: str, address: str) -> None:
        wait_s = self._addresses.wait_s(address) if address else 0.0
        if not address or self._addresses.has_failed(address):
            wait_s = max(wait_s, self._users.wait_s(who))
        if wait_s > 0:
            raise TooManyAttempts(f"too many failed attempts: try again in {wait_s:.1f} s")

    def _looked(self, fingerprint: bytes, done: asyncio.Task[_Proven | None]) -> None:
        del self._looking[fingerprint]
        if done.cancelled() or done.exception() is not None:
            return
        if (proven := done.result()) is not None:
            self._proven[fingerprint] = proven
            if len(self._proven) > REMEMBERED_MAX:
                self._proven.popitem(last=False)

    async def _refuse(self, who: str, address: str) -> None:
        """Note a failure and hold its answer back."""
        wait_s = self._users.failed(who)
        if address:
            wait_s = max(wait_s, self._addresses.failed(address))
        if self._delayed < DELAYED_MAX:
            self._delayed += 1
            try:
                await asyncio.sleep(min(wait_s, ANSWER_DELAY_S_MAX))
            finally:
                self._delayed -= 1

    async def _look(self, user: str, password: str, who: str, address: str) -> _Proven | None:
        async with self._turn:
            self._check_turn(who, address)  # others may have failed while this one waited
            await self._prepare()
            access = self._state()
            kept = self._kept(access, user)
            right = await self._executor.run(Lane.CREDENTIALS, passwords.matches, password, kept or self._decoy)
        if not right or not kept:
            return None
        self._remind(user, password)
        access = self._state()
        rights = access.rights(user)
        if rights is None or self._kept(access, user) != kept:
            return None
        until_s = self._clock.monotonic_s() + self._settings.cache_s
        return _Proven(user, kept, "", until_s, 0, access.version, rights)

    async def _look_key(self, key_id: str, secret: str) -> _Proven | None:
        access, now_ms = self._state(), self._clock.wall_ms()
        key, digest = access.keys.get(key_id), passwords.digest_of(secret)
        if key is None:
            return None
        if hmac.compare_digest(digest, key.digest):
            expires_ms = key.expires_ms
        elif key.old_digest and hmac.compare_digest(digest, key.old_digest) and now_ms < key.old_until_ms:
            expires_ms = min(key.old_until_ms, key.expires_ms or key.old_until_ms)
        else:
            return None
        rights = access.rights(key.user)
        if rights is None or 0 < expires_ms <= now_ms:
            return None
        until_s = self._clock.monotonic_s() + self._settings.cache_s
        return _Proven(key.user, digest, key_id, until_s, expires_ms, access.version, rights)

    async def _prepare(self) -> None:
        """Make what unknown users are compared with, and root as long as its password is that of the settings."""
        cost = self._settings.hash_cost
        if not self._decoy:
            self._decoy = await self._executor.run(Lane.CREDENTIALS, passwords.make, secrets.token_hex(16), cost)
        if not self._initial:
            self._initial = await self._executor.run(
                Lane.CREDENTIALS, passwords.make, self._settings.root_password, cost
            )

    def _remind(self, user: str, password: str) -> None:
        now_s = self._clock.monotonic_s()
        if user == ROOT and password == WELL_KNOWN and now_s - self._reminded_s >= REMIND_S:
            self._reminded_s = now_s
            log.warning(
                "ROOT STILL HAS THE PASSWORD THAT EVERYBODY KNOWS: change it with users/update_password, or set "
                "auth.root_password_file on every node"
            )

    # whether

    def check(
        self,
        rights: Rights | None,
        privilege: str,
        scope: Scope,
        database: str,
        names: Sequence[str] = (),
        *,
        alias: str = "",
        collection_ids: Iterable[int] = (),
        users: Iterable[str] = (),
    ) -> None:
        """Raise NotPermitted unless the one who asks has the privilege on everything that the request names.

        names, alias, collection_ids  collections by name (or alias), by an alias, by id; nothing named is all of them
        users                         for privileges on users
        """
        catalog = self._catalog() if self.is_on or self.audit.is_on else None
        places: list[tuple[str, str]] = []
        if catalog is not None:
            has_alias = alias and (not names or (database, alias) in catalog.aliases)
            for name in (*names, *((alias,) if has_alias else ())):
                found = catalog.aliases.get((database, name)) if (database, name) not in catalog.names else None
                owner = None if found is None else catalog.collections.get(found)
                places.append((database, name if owner is None else owner.name))
            if not places:
                for one in collection_ids:
                    owner = catalog.collections.get(CollectionId(one))
                    places.append((ANY, ANY) if owner is None else (owner.database, owner.name))
        who = [one for one in users if one]
        scope.database, scope.objects = database, tuple(who or [name for _, name in places])
        if rights is None or privilege in (ANYONE, OPEN) or rights.is_super:
            return
        if privilege == UNLISTED:
            allowed = False
        elif is_about_users(privilege):
            allowed = bool(who) and all(one == rights.name or rights.may_user(privilege, one) for one in who)
            allowed = allowed or rights.may(privilege)
        else:
            allowed = True
            for place in places or [(database, ANY)]:
                allowed = allowed and rights.may(privilege, *place)
        if not allowed:
            what = privilege if privilege != UNLISTED else "admin"
            raise NotPermitted(f"privilege not permitted: Privilege{what}: permission deny to {rights.name}")

    def note(self, operation: str, privilege: str, scope: Scope, address: str, code: int, request_id: str = "") -> None:
        """Write down how an operation ended."""
        refused = code in (1401, 1800, 1807)
        if not self.audit.is_on or not (refused or is_audited(privilege, reads=self.audit.has_reads)):
            return
        self.audit.write(
            who=scope.who or ("" if self.is_on else "(authentication is off)"),
            address=address,
            operation=operation,
            outcome="refused" if refused else "failed" if code > 0 else "left" if code < 0 else "done",
            code=code,
            database=scope.database,
            objects=scope.objects,
            request_id=request_id,
        )


def plain(shown: str) -> str:
    """Return `user:password` or the token of an Authorization header."""
    kind, _, rest = shown.partition(" ")
    if kind.lower() == "bearer":
        return rest.strip()
    if kind.lower() == "basic":
        return from_base64(rest.strip())
    return shown.strip()


def from_base64(text: str) -> str:
    """Return what a text stands for in base64, "" if it is none."""
    try:
        return b64decode(text, validate=True).decode()
    except (Base64Error, ValueError):
        return ""


def entry_token(cluster_secret: str) -> str:
    """Return what a newcomer shows to be told where to prove itself: it follows from the secret, and is not it."""
    if not cluster_secret:
        return ""
    return "Bearer newcomer-" + hmac.new(cluster_secret.encode(), b"annulus entry", "sha256").hexdigest()


def names_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a request of the REST API names, as `Guard.check` takes it."""
    name, alias = values.get("collectionName"), values.get("aliasName")
    collection_id, user = values.get("collectionID"), values.get("userName")
    return {
        "names": (name,) if name else (),
        "alias": alias or "",
        "collection_ids": (collection_id,) if isinstance(collection_id, int) else (),
        "users": (user,) if user else (),
    }
