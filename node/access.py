"""What a node can do about users, roles, grants, privilege groups and API keys: the part of the service that is theirs.

Every change is a command of the control group. It is answered when the nodes that can be reached have it, not this one
alone: a password that was changed here is refused everywhere from the answer on. A node that cannot be reached learns
of it with the log, before it takes part in anything again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from cluster.access import (
    BUILT_IN_ROLES,
    ROOT,
    Access,
    AlterGroup,
    AlterRole,
    ApiKey,
    CreateGroup,
    CreateKey,
    CreateRole,
    CreateUser,
    DropGroup,
    DropRole,
    DropUser,
    Grant,
    RestoreAccess,
    RevokeKey,
    RotateKey,
    SetGrant,
    SetPassword,
    SetUserRole,
    User,
)
from cluster.message import Message, to_plain
from cluster.privileges import BUILT_IN_GROUPS
from node import passwords
from node.node import Node
from node.scope import current
from node.throttle import Throttle
from node.workers import Lane
from storage.errors import AnnulusError, InvalidParameter, NotAuthenticated, NotPermitted, TooManyAttempts
from storage.types import Position

log = logging.getLogger(__name__)

SEEN_METHOD: Final = "access/seen"
SEEN_S: Final = 2.0
"""How long a change waits for the other nodes."""
FOREVER_S: Final = 0


class AccessService:
    """See above. Raises errors of `storage.errors`; names are checked where a change is applied."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._initial = ""
        self._wrong = Throttle(node.seams.clock, node.settings.auth.delay_s_max)
        if node.mesh is not None:
            node.mesh.serve(SEEN_METHOD, self._seen)

    # users

    async def create_user(self, name: str, password: str, description: str = "") -> None:
        passwords.check_password(password)
        await self._change(CreateUser(name, await self._kept(password), description))

    async def update_password(self, name: str, old: str, new: str, description: str = "") -> None:
        """root may change those of others without knowing them. Raises NotAuthenticated if the old one is wrong."""
        passwords.check_password(new)
        await self._node.router.refresh_catalog()
        user = self._access.user(name)
        if not (self._who == ROOT and name != ROOT and not old):
            await self._check_old(name, user.password, old)
        await self._change(SetPassword(name, await self._kept(new), user.password, description))

    async def drop_user(self, name: str) -> None:
        await self._change(DropUser(name))

    async def list_users(self) -> list[str]:
        await self._node.router.refresh_catalog()
        return [ROOT, *(name for name in self._access.users if name != ROOT)]

    async def describe_user(self, name: str) -> tuple[Sequence[str], str]:
        """Return the user's roles and description."""
        await self._node.router.refresh_catalog()
        user = self._access.user(name)
        return user.roles, user.description

    async def set_role(self, user: str, role: str, has: bool) -> None:
        await self._change(SetUserRole(user, role, has))

    # roles

    async def create_role(self, name: str, description: str = "") -> None:
        await self._change(CreateRole(name, description))

    async def alter_role(self, name: str, description: str) -> None:
        await self._change(AlterRole(name, description))

    async def drop_role(self, name: str, force: bool = False) -> None:
        await self._change(DropRole(name, force))

    async def list_roles(self) -> list[str]:
        await self._node.router.refresh_catalog()
        return list(self._access.roles)

    async def describe_role(self, name: str) -> tuple[Sequence[Grant], str, Sequence[str]]:
        """Return the role's grants, its description, and the users that have it."""
        await self._node.router.refresh_catalog()
        access = self._access
        role = access.role(name)
        users = [one for one in await self.list_users() if name in access.user(one).roles]
        return role.grants, role.description, users

    async def set_grant(
        self, role: str, privilege: str, database: str, object_name: str, *, object_type: str = "", has: bool
    ) -> None:
        """Without an object type the grant is of the form that names a database and a collection."""
        await self._change(SetGrant(role, object_type, object_name, privilege, database, self._who, has))

    # backup

    async def backup(self) -> Access:
        """Return users, roles, grants and groups as they are now; the state is not to be changed."""
        await self._node.router.refresh_catalog()
        return self._access

    async def restore(
        self,
        users: Iterable[User],
        roles: Iterable[tuple[str, str]],
        groups: Mapping[str, Sequence[str]],
        grants: Iterable[tuple[str, Grant]],
    ) -> None:
        """Make all of them, or none: one that is there already refuses the whole. What everybody has is passed over.

        roles   names and descriptions
        groups  name -> privileges
        grants  role and grant; those of the role `public` are added to what it has
        """
        changes: list[Message] = [CreateRole(*one) for one in roles if one[0] not in BUILT_IN_ROLES]
        for name, privileges in groups.items():
            changes += [CreateGroup(name), AlterGroup(name, list(privileges), True)]
        for role, one in grants:
            is_group = one.privilege in BUILT_IN_GROUPS or one.privilege in groups
            kind = "" if is_group else one.object_type
            changes.append(SetGrant(role, kind, one.object_name, one.privilege, one.database, one.grantor, True))
        for user in users:
            if user.name == ROOT:
                continue
            if not passwords.is_kept(user.password):
                raise InvalidParameter(
                    f"the password of {user.name[:80]} is not kept as this server keeps passwords: create the user anew"
                )
            changes.append(CreateUser(user.name, user.password, user.description))
            changes += [SetUserRole(user.name, role, True) for role in user.roles]
        await self._change(RestoreAccess([list(to_plain(one)) for one in changes]))

    # privilege groups

    async def create_group(self, name: str) -> None:
        await self._change(CreateGroup(name))

    async def drop_group(self, name: str) -> None:
        await self._change(DropGroup(name))

    async def alter_group(self, name: str, privileges: Sequence[str], *, add: bool) -> None:
        await self._change(AlterGroup(name, list(privileges), add))

    async def list_groups(self) -> dict[str, list[str]]:
        await self._node.router.refresh_catalog()
        return {name: sorted(one) for name, one in {**BUILT_IN_GROUPS, **self._access.groups}.items()}

    # API keys

    async def create_key(self, user: str, lifetime_s: int | None, description: str = "") -> Mapping[str, Any]:
        """Return {keyId, apiKey, userName, expiresMs}; the key is shown this once.

        user        "" for the one who asks; only admins make keys for others, and only root for root
        lifetime_s  0 for one that does not expire, None for the setting's
        """
        user = user or self._who
        await self._check_own(user)
        key_id, shown, digest = passwords.new_key()
        expires_ms = self._expires_ms(lifetime_s)
        await self._change(CreateKey(key_id, user, digest, expires_ms, description))
        return {"keyId": key_id, "apiKey": shown, "userName": user, "expiresMs": expires_ms}

    async def rotate_key(self, key_id: str, lifetime_s: int | None, grace_s: int) -> Mapping[str, Any]:
        """Give a key another secret; the old one is good for `grace_s` more. Returns as `create_key`."""
        key = await self._own_key(key_id)
        shown, digest = passwords.new_secret(key_id)
        expires_ms = self._expires_ms(lifetime_s)
        old_until_ms = self._node.seams.clock.wall_ms() + 1000 * max(0, min(grace_s, 86_400))
        await self._change(RotateKey(key_id, digest, expires_ms, old_until_ms))
        return {"keyId": key_id, "apiKey": shown, "userName": key.user, "expiresMs": expires_ms}

    async def revoke_key(self, key_id: str) -> None:
        await self._own_key(key_id)
        await self._change(RevokeKey(key_id))

    async def list_keys(self, user: str = "") -> list[Mapping[str, Any]]:
        """Return the keys of a user, without their secrets; those of the one who asks if none is named."""
        user = user or self._who
        await self._check_own(user)
        return [
            {
                "keyId": one.key_id,
                "userName": one.user,
                "description": one.description,
                "createdMs": one.created_ms,
                "expiresMs": one.expires_ms,
            }
            for one in self._access.keys.values()
            if one.user == user
        ]

    # how

    @property
    def _access(self) -> Access:
        return self._node.control.machine.access

    @property
    def _who(self) -> str:
        """The user that asks; while authentication is off anybody may do what root may."""
        scope = current.get()
        return ROOT if scope is None else scope.who or ROOT

    async def _check_own(self, user: str) -> None:
        await self._node.router.refresh_catalog()
        if user == self._who:
            return
        rights = self._access.rights(self._who)
        if rights is None or not rights.is_super or user == ROOT:
            raise NotPermitted(f"privilege not permitted: the api keys of {user} are not those of {self._who}")

    async def _own_key(self, key_id: str) -> ApiKey:
        await self._node.router.refresh_catalog()
        key = self._access.keys.get(key_id)
        rights = self._access.rights(self._who)
        if key is None or rights is None or (key.user != self._who and not rights.is_super):
            raise InvalidParameter(f"there is no api key {key_id[:80]}")  # nor is it said that others have one
        await self._check_own(key.user)
        return key

    def _expires_ms(self, lifetime_s: int | None) -> int:
        seconds = self._node.settings.auth.token_s if lifetime_s is None else lifetime_s
        if not 0 <= seconds <= 100 * 366 * 86_400:
            raise InvalidParameter("lifetimeSeconds is from 0, for a key that does not expire, to 100 years")
        return 0 if seconds == FOREVER_S else self._node.seams.clock.wall_ms() + int(1000 * seconds)

    async def _kept(self, password: str) -> str:
        run, cost = self._node.seams.executor.run, self._node.settings.auth.hash_cost
        return await run(Lane.CREDENTIALS, passwords.make, password, cost)

    async def _check_old(self, name: str, kept: str, old: str) -> None:
        """Raise NotAuthenticated unless it is the user's password, and TooManyAttempts for who tries too often."""
        if (wait_s := self._wrong.wait_s(name)) > 0:
            raise TooManyAttempts(f"too many failed attempts: try again in {wait_s:.1f} s")
        if not await self._is(kept, old):
            self._wrong.failed(name)
            raise NotAuthenticated(f"old password not correct for {name}: not authenticated")
        self._wrong.succeeded(name)

    async def _is(self, kept: str, password: str) -> bool:
        """Return whether this is the password; that of root is the settings' as long as none is kept."""
        if not kept:
            if not self._initial:
                self._initial = await self._kept(self._node.settings.auth.root_password)
            kept = self._initial
        return await self._node.seams.executor.run(Lane.CREDENTIALS, passwords.matches, password, kept)

    async def _change(self, message: Message) -> None:
        await self._node.router.broadcast(message)
        mesh = self._node.mesh
        if mesh is None:
            return
        asked = {"position": int(self._node.control.machine.position)}
        others = [name for name in self._node.members if name != self._node.name]
        answers = await asyncio.gather(
            *(mesh.call(name, SEEN_METHOD, asked, timeout_s=SEEN_S) for name in others), return_exceptions=True
        )
        for name, answer in zip(others, answers, strict=True):
            if isinstance(answer, AnnulusError):
                log.warning("a node learns later who its users are node=%s: %s", name, answer.message)
            elif isinstance(answer, BaseException):
                raise answer

    async def _seen(
        self, peer: str, arguments: dict[str, Any], blobs: Sequence[memoryview]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        await self._node.control.wait_applied(Position(int(arguments["position"])))
        return {}, ()
