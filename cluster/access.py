"""Who may do what: users, roles, grants, privilege groups and API keys, as the control group has decided them.

Commands change it like the catalogue: each is one entry of the control group's log and checks what it needs when it is
applied. Secrets do not come here: a password is the text that `node/passwords.py` makes of it, an API key the digest of
its secret, both made on the node that was asked. Time is that of the log's ticks.

`root` may do everything and cannot be dropped. It is in here only once its password was changed: until then it is the
one of each node's settings. Everybody has the role `public`; who has `admin` may do everything too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from cluster.message import Message, from_plain
from cluster.parse import check_values
from cluster.privileges import (
    ALL,
    ANY,
    BUILT_IN_GROUPS,
    LEVELS,
    PRIVILEGES_OF,
    Level,
    ObjectType,
    object_type_of,
)
from storage.errors import GroupNameInvalid, InvalidParameter, JournalDamaged, NotAuthenticated, NotPermitted
from storage.types import Tick, tick_ms

ROOT: Final = "root"
ADMIN: Final = "admin"
PUBLIC: Final = "public"
BUILT_IN_ROLES: Final = (ADMIN, PUBLIC)
USERS_MAX: Final = 1_024
ROLES_MAX: Final = 1_024
GRANTS_MAX: Final = 4_096
"""Of one role."""
GROUPS_MAX: Final = 1_024
KEYS_MAX: Final = 4_096
KEYS_OF_USER_MAX: Final = 64
NAME_CHARS_MAX: Final = 32
ROLE_CHARS_MAX: Final = 255
DESCRIPTION_BYTES_MAX: Final = 1_024
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*", re.ASCII)
_ROLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


_OF_CLUSTER: Final = frozenset(name for name, level in LEVELS.items() if level is Level.CLUSTER)


@dataclass(frozen=True)
class User:
    name: str
    password: str
    """What `node/passwords.py` made of it."""
    description: str = ""
    roles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grant:
    """A role has a privilege, or all of a group, on objects; `*` stands for any database and any name."""

    object_type: str
    object_name: str
    privilege: str
    database: str
    grantor: str = field(default="", compare=False)


@dataclass(frozen=True)
class Role:
    name: str
    description: str = ""
    grants: tuple[Grant, ...] = ()


@dataclass(frozen=True)
class ApiKey:
    """Whoever shows the secret of which this is the digest acts as the user."""

    key_id: str
    user: str
    digest: str
    expires_ms: int
    """Wall time; 0 for never."""
    description: str = ""
    created_ms: int = 0
    old_digest: str = ""
    """Of the secret before the last rotation."""
    old_until_ms: int = 0


@dataclass(frozen=True)
class CreateUser(Message):
    kind = "create_user"
    name: str
    password: str
    description: str


@dataclass(frozen=True)
class SetPassword(Message):
    """Changes a user's password, if it is still `expected`: what the node that was asked has looked at."""

    kind = "set_password"
    name: str
    password: str
    expected: str
    description: str


@dataclass(frozen=True)
class DropUser(Message):
    kind = "drop_user"
    name: str


@dataclass(frozen=True)
class SetUserRole(Message):
    """The user has the role from now on, or has it no more."""

    kind = "set_user_role"
    user: str
    role: str
    has: bool


@dataclass(frozen=True)
class CreateRole(Message):
    kind = "create_role"
    name: str
    description: str


@dataclass(frozen=True)
class AlterRole(Message):
    kind = "alter_role"
    name: str
    description: str


@dataclass(frozen=True)
class DropRole(Message):
    """With `force` also a role that has grants."""

    kind = "drop_role"
    name: str
    force: bool


@dataclass(frozen=True)
class SetGrant(Message):
    """The role has this grant from now on, or has it no more.

    object_type  empty in the form that names a database and a collection: the privilege, or group, tells
    """

    kind = "set_grant"
    role: str
    object_type: str
    object_name: str
    privilege: str
    database: str
    grantor: str
    has: bool


@dataclass(frozen=True)
class CreateGroup(Message):
    kind = "create_privilege_group"
    name: str


@dataclass(frozen=True)
class DropGroup(Message):
    kind = "drop_privilege_group"
    name: str


@dataclass(frozen=True)
class AlterGroup(Message):
    """Puts privileges into a group, or takes them out."""

    kind = "alter_privilege_group"
    name: str
    privileges: Sequence[str]
    add: bool


@dataclass(frozen=True)
class RestoreAccess(Message):
    """All of these changes are made, or none: [kind, values] as `cluster.message.to_plain` gives them."""

    kind = "restore_access"
    changes: Sequence[Any]


@dataclass(frozen=True)
class CreateKey(Message):
    kind = "create_api_key"
    key_id: str
    user: str
    digest: str
    expires_ms: int
    description: str


@dataclass(frozen=True)
class RotateKey(Message):
    """The key has another secret; the one that it had is good until `old_until_ms`."""

    kind = "rotate_api_key"
    key_id: str
    digest: str
    expires_ms: int
    old_until_ms: int


@dataclass(frozen=True)
class RevokeKey(Message):
    kind = "revoke_api_key"
    key_id: str


class Rights:
    """What one user may do, made ready to be asked on every request."""

    def __init__(
        self, name: str, *, is_super: bool, grants: Iterable[tuple[str, Iterable[str], str, str, bool]]
    ) -> None:
        """`grants` yields (object type, privileges, database, object name, whether it is everybody's)."""
        self.name = name
        self.is_super = is_super
        self._allowed: dict[tuple[str, bool], set[tuple[str, str]]] = {}
        self._seen: set[tuple[str, str]] = set()
        """Where the user has a privilege of its own."""
        for object_type, privileges, database, object_name, is_public in grants:
            of_user = object_type == ObjectType.USER
            for privilege in privileges:
                self._allowed.setdefault((privilege, of_user), set()).add((database, object_name))
            if not is_public and not of_user:
                self._seen.add((database, object_name))

    def may(self, privilege: str, database: str = ANY, name: str = ANY) -> bool:
        """Return whether the user has the privilege on an object: `*` asks for all objects of the database, or all."""
        if self.is_super:
            return True
        allowed = self._allowed.get((privilege, False), ())
        if privilege in _OF_CLUSTER:
            return any(object_name == ANY for _, object_name in allowed)
        return _covered(allowed, database, name)

    def may_user(self, privilege: str, user: str) -> bool:
        """Return whether the user has a privilege on another user."""
        granted = self._allowed.get((privilege, True), ())
        return self.is_super or any(name in (ANY, user) for _, name in granted) or self.may(privilege)

    def sees(self, database: str, name: str = "") -> bool:
        """Return whether a list shows the user a database, or a collection in it: it may do something there."""
        if self.is_super:
            return True
        if name:
            return _covered(self._seen, database, name)
        return any(one in (ANY, database) for one, _ in self._seen)


def _covered(allowed: Iterable[tuple[str, str]], database: str, name: str) -> bool:
    return (
        (ANY, ANY) in allowed
        or (database, ANY) in allowed
        or (database, name) in allowed
        or (ANY, name) in allowed
    )  # fmt: skip


def _new_roles() -> dict[str, Role]:
    """Return the roles that are there from the first; what everybody may do is Milvus's, and can be revoked."""
    everywhere = [("Global", "DescribeCollection"), ("Global", "ListAliases"), ("Collection", "IndexDetail")]
    grants = tuple(Grant(kind, ANY, privilege, ANY, ROOT) for kind, privilege in everywhere)
    return {ADMIN: Role(ADMIN), PUBLIC: Role(PUBLIC, grants=grants)}


class Access:
    """The state. Values are frozen; `copy` copies the maps."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}
        self.roles: dict[str, Role] = _new_roles()
        self.groups: dict[str, frozenset[str]] = {}
        self.keys: dict[str, ApiKey] = {}
        self.version = 0
        """Ascends with each change: what was derived from an older one is to be derived again."""

    # lookups

    def user(self, name: str) -> User:
        """Raises InvalidParameter."""
        found = self.users.get(name)
        if found is None:
            if name == ROOT:
                return User(ROOT, "", roles=(ADMIN,))
            raise InvalidParameter("not found the user, maybe the user isn't existed or internal system error")
        return found

    def role(self, name: str) -> Role:
        """Raises InvalidParameter."""
        found = self.roles.get(name)
        if found is None:
            raise InvalidParameter("not found the role, maybe the role isn't existed or internal system error")
        return found

    def rights(self, name: str) -> Rights | None:
        """Return what a user may do as things are now; None if there is no such user."""
        if name != ROOT and name not in self.users:
            return None
        roles = self.user(name).roles
        held = [(self.roles[one], False) for one in roles if one in self.roles] + [(self.roles[PUBLIC], True)]
        return Rights(
            name,
            is_super=name == ROOT or ADMIN in roles,
            grants=[
                (one.object_type, self.expand(one), one.database, one.object_name, is_public)
                for role, is_public in held
                for one in role.grants
            ],
        )

    def expand(self, grant: Grant) -> frozenset[str]:
        """Return the privileges that a grant gives."""
        if grant.privilege in (ALL, ANY):
            return PRIVILEGES_OF[grant.object_type]
        group = BUILT_IN_GROUPS.get(grant.privilege) or self.groups.get(grant.privilege)
        return frozenset({grant.privilege}) if group is None else group

    # changes

    def change(self, message: Message, tick: Tick) -> Mapping[str, Any] | None:
        """Apply a command; None if it is none of these. Raises BadRequest, having changed nothing."""
        match message:
            case CreateUser():
                self._create_user(message)
            case SetPassword():
                self._set_password(message)
            case DropUser(name):
                if name == ROOT:
                    raise NotPermitted("root user cannot be deleted")
                if self.users.pop(name, None) is not None:
                    self.keys = {key_id: one for key_id, one in self.keys.items() if one.user != name}
            case SetUserRole(name, role, has):
                user, _ = self.user(name), self.role(role)
                if name == ROOT:
                    raise NotPermitted("root may do everything, its roles are not changed")
                kept = tuple(one for one in user.roles if one != role)
                self.users[name] = replace(user, roles=(*kept, role) if has else kept)
            case CreateRole(name, description):
                _check_role_name(name)
                _check_description(description)
                if name in self.roles:
                    raise InvalidParameter(f'role [name:"{name}"] already exists')
                if len(self.roles) >= ROLES_MAX:
                    raise InvalidParameter(f"unable to create role because the number of roles has reached {ROLES_MAX}")
                self.roles[name] = Role(name, description)
            case AlterRole(name, description):
                _check_description(description)
                self.roles[name] = replace(self.role(name), description=description)
            case DropRole(name, force):
                self._drop_role(name, force)
            case SetGrant():
                self._set_grant(message)
            case CreateGroup() | DropGroup() | AlterGroup():
                self._change_group(message)
            case RestoreAccess(changes):
                self._restore(changes, tick)
            case CreateKey() | RotateKey() | RevokeKey():
                self._change_key(message, tick)
            case _:
                return None
        self.version += 1
        return {}

    def _restore(self, changes: Sequence[Any], tick: Tick) -> None:
        trial = self.copy()
        for change in changes:
            match change:
                case [str(kind), [*values]] if kind in _RESTORABLE:
                    try:
                        message = from_plain(kind, values)
                    except JournalDamaged as error:
                        raise InvalidParameter(f"not a change of users or roles: {error.message}") from None
                    check_values(message, kind)
                    trial.change(message, tick)
                case _:
                    raise InvalidParameter("a backup of users and roles has users, roles, grants and groups alone")
        self.users, self.roles, self.groups = trial.users, trial.roles, trial.groups

    def forget(self, database: str, name: str) -> None:
        """Take the grants on a collection from all roles: it is gone, and the next of its name is another one."""
        self._move(lambda grant: _is_on(grant, database, name), None)

    def forget_database(self, name: str) -> None:
        """Take the grants in a database from all roles, like those on a collection that is gone."""
        self._move(lambda grant: grant.database == name and grant.object_type != ObjectType.USER, None)

    def follow(self, database: str, name: str, new: tuple[str, str]) -> None:
        """Let the grants on a collection be on it under its new database and name."""
        self._move(lambda grant: _is_on(grant, database, name), new)

    def _move(self, is_meant: Callable[[Grant], bool], new: tuple[str, str] | None) -> None:
        for role in list(self.roles.values()):
            found = [one for one in role.grants if is_meant(one)]
            if not found:
                continue
            moved = () if new is None else (replace(one, database=new[0], object_name=new[1]) for one in found)
            kept = dict.fromkeys((*(one for one in role.grants if one not in found), *moved))
            self.roles[role.name] = replace(role, grants=tuple(kept))
            self.version += 1

    def _create_user(self, message: CreateUser) -> None:
        _check_user_name(message.name)
        _check_description(message.description)
        if message.name in self.users or message.name == ROOT:
            raise InvalidParameter(f"user already exists: {message.name}")
        if len(self.users) >= USERS_MAX:
            raise InvalidParameter(f"unable to add user because the number of users has reached {USERS_MAX}")
        self.users[message.name] = User(message.name, message.password, message.description)

    def _set_password(self, message: SetPassword) -> None:
        user = self.user(message.name)
        _check_description(message.description)
        if user.password != message.expected:
            raise NotAuthenticated(f"old password not correct for {message.name}: not authenticated")
        description = message.description or user.description
        self.users[message.name] = replace(user, password=message.password, description=description)

    def _drop_role(self, name: str, force: bool) -> None:
        if name in BUILT_IN_ROLES:
            raise NotPermitted(f"the role[{name}] is a default role, which can't be dropped")
        if self.role(name).grants and not force:
            raise InvalidParameter(
                f"fail to drop the role[{name}] that it has privileges. Use REVOKE API to revoke privileges"
            )
        del self.roles[name]
        for user in list(self.users.values()):
            if name in user.roles:
                self.users[user.name] = replace(user, roles=tuple(one for one in user.roles if one != name))

    def _set_grant(self, message: SetGrant) -> None:
        role = self.role(message.role)
        if message.role == ADMIN:
            raise NotPermitted("the role admin has every privilege, its grants are not changed")
        if not message.object_name or not message.database:
            raise InvalidParameter("a grant names its objects and their database, or * for all")
        object_type = message.object_type or self._checked_level(message)
        if message.object_type and message.privilege not in (ALL, ANY):
            known = PRIVILEGES_OF.get(object_type)
            if known is None:
                kinds = " ".join(ObjectType)
                raise InvalidParameter(
                    f"not found the object type[name: {object_type[:80]}], supported the object types: [{kinds}]"
                )
            if message.privilege not in known:
                raise InvalidParameter(f"not found the privilege name[{message.privilege[:80]}] of {object_type}")
        elif object_type not in PRIVILEGES_OF:
            raise InvalidParameter(f"not found the object type[name: {object_type[:80]}]")
        grant = Grant(object_type, message.object_name, message.privilege, message.database, message.grantor)
        kept = tuple(one for one in role.grants if one != grant)
        if message.has and len(kept) >= GRANTS_MAX:
            raise InvalidParameter(f"a role has at most {GRANTS_MAX} grants")
        self.roles[role.name] = replace(role, grants=(*kept, grant) if message.has else kept)

    def _checked_level(self, message: SetGrant) -> str:
        """Return the kind of object of a grant that names none. Raises InvalidParameter if it reaches too little."""
        privilege, where = message.privilege, (message.database, message.object_name)
        group = BUILT_IN_GROUPS.get(privilege)
        if group is None:
            group = self.groups.get(privilege, frozenset({privilege}))
        if not group <= LEVELS.keys():
            raise InvalidParameter(f"not found the privilege name[{privilege[:80]}]")
        levels = {LEVELS[one] for one in group}
        if message.has and Level.CLUSTER in levels and where != (ANY, ANY):
            raise InvalidParameter(
                f"dbName and collectionName should be * for the cluster level privilege: {privilege}"
            )
        if message.has and Level.DATABASE in levels and where[1] != ANY:
            raise InvalidParameter(f"collectionName should be * for the database level privilege: {privilege}")
        return object_type_of(privilege) if privilege in LEVELS and privilege not in _USERS else ObjectType.GLOBAL

    def _change_group(self, message: CreateGroup | DropGroup | AlterGroup) -> None:
        name = message.name
        if isinstance(message, CreateGroup):
            if not _ROLE.fullmatch(name) or len(name) > ROLE_CHARS_MAX:
                raise GroupNameInvalid(f"privilege group name [{name[:80]}] has letters, digits and _ only")
            if name in BUILT_IN_GROUPS or name in LEVELS or name == ALL or name in self.groups:
                raise GroupNameInvalid(f"privilege group name [{name}] is defined by built in privileges or groups")
            if len(self.groups) >= GROUPS_MAX:
                raise InvalidParameter(f"the number of privilege groups has reached {GROUPS_MAX}")
            self.groups[name] = frozenset()
            return
        if name in BUILT_IN_GROUPS:
            raise GroupNameInvalid(f"the privilege group {name} is built in, and can't be changed")
        if isinstance(message, DropGroup):
            user = next((role.name for role in self.roles.values() if _grants_of(role, name)), "")
            if user:
                raise InvalidParameter(
                    f"privilege group [{name}] is used by role [{user}], Use REVOKE API to revoke it"
                )
            self.groups.pop(name, None)
            return
        if name not in self.groups:
            raise InvalidParameter(f"there is no privilege group name [{name[:80]}] to operate")
        given = frozenset(name for one in message.privileges for name in self.groups.get(one, (one,)))
        unknown = sorted(one for one in given if one not in LEVELS)
        if unknown:
            raise InvalidParameter(f"there is no privilege name or privilege group name [{unknown[0][:80]}] defined")
        after = self.groups[name] | given if message.add else self.groups[name] - given
        levels = {LEVELS[one] for one in after}
        for role in self.roles.values():
            for one in _grants_of(role, name):
                if (Level.CLUSTER in levels and one.database != ANY) or (
                    levels - {Level.COLLECTION} and one.object_name != ANY
                ):
                    raise InvalidParameter(
                        f"privilege group [{name}] is granted to role [{role.name}] on {one.database}."
                        f"{one.object_name}, which is too little for these privileges"
                    )
        self.groups[name] = after

    def _change_key(self, message: CreateKey | RotateKey | RevokeKey, tick: Tick) -> None:
        now_ms = tick_ms(tick)
        if isinstance(message, CreateKey):
            self.user(message.user)
            _check_description(message.description)
            if message.key_id in self.keys:
                raise InvalidParameter(f"api key {message.key_id} already exists")
            kept = {key_id: one for key_id, one in self.keys.items() if not 0 < one.expires_ms < now_ms}
            if sum(one.user == message.user for one in kept.values()) >= KEYS_OF_USER_MAX or len(kept) >= KEYS_MAX:
                raise InvalidParameter(f"a user has at most {KEYS_OF_USER_MAX} api keys, and all have {KEYS_MAX}")
            self.keys = kept
            self.keys[message.key_id] = ApiKey(
                message.key_id, message.user, message.digest, message.expires_ms, message.description, now_ms
            )
            return
        known = self.keys.get(message.key_id)
        if known is None:
            raise InvalidParameter(f"there is no api key {message.key_id[:80]}")
        if isinstance(message, RevokeKey):
            del self.keys[message.key_id]
            return
        self.keys[message.key_id] = replace(
            known,
            digest=message.digest,
            expires_ms=message.expires_ms,
            old_digest=known.digest,
            old_until_ms=message.old_until_ms,
        )

    # checkpoint

    def copy(self) -> Access:
        copy = Access()
        copy.users, copy.roles = dict(self.users), dict(self.roles)
        copy.groups, copy.keys, copy.version = dict(self.groups), dict(self.keys), self.version
        return copy

    def to_plain(self) -> dict[str, Any]:
        return {
            "format": 1,
            "version": self.version,
            "users": [asdict(one) for one in self.users.values()],
            "roles": [asdict(one) for one in self.roles.values()],
            "groups": [[name, sorted(privileges)] for name, privileges in self.groups.items()],
            "keys": [asdict(one) for one in self.keys.values()],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Access:
        access = cls()
        if plain["format"] != 1:
            raise ValueError(f"users and roles in format {plain['format']}: a newer program wrote them; start that one")
        access.version = plain["version"]
        access.users = {one["name"]: User(**{**one, "roles": tuple(one["roles"])}) for one in plain["users"]}
        access.roles = {
            one["name"]: Role(one["name"], one["description"], tuple(Grant(**grant) for grant in one["grants"]))
            for one in plain["roles"]
        }
        access.groups = {name: frozenset(privileges) for name, privileges in plain["groups"]}
        access.keys = {one["key_id"]: ApiKey(**one) for one in plain["keys"]}
        return access


_RESTORABLE: Final = frozenset(
    kind.kind for kind in (CreateUser, SetUserRole, CreateRole, SetGrant, CreateGroup, AlterGroup)
)
_USERS: Final = PRIVILEGES_OF[ObjectType.USER]
"""Privileges on users, which a grant without a kind of object gives on all of them."""


def _grants_of(role: Role, group: str) -> list[Grant]:
    return [one for one in role.grants if one.privilege == group]


def _is_on(grant: Grant, database: str, name: str) -> bool:
    """Return whether a grant is on this very collection, not on all or on those of a name in any database."""
    return (grant.database, grant.object_name) == (database, name) and grant.object_type != ObjectType.USER


def _check_user_name(name: str) -> None:
    if not name or len(name) > NAME_CHARS_MAX or not _NAME.fullmatch(name):
        raise InvalidParameter(
            f"invalid user name {name[:80]!r}: a letter, then letters, digits, _.-; at most {NAME_CHARS_MAX} of them"
        )


def _check_role_name(name: str) -> None:
    if not _ROLE.fullmatch(name) or len(name) > ROLE_CHARS_MAX:
        raise InvalidParameter(f"invalid role name {name[:80]!r}: a letter or _, then letters, digits and _")


def _check_description(text: str) -> None:
    if len(text.encode()) > DESCRIPTION_BYTES_MAX:
        raise InvalidParameter(f"the description is longer than {DESCRIPTION_BYTES_MAX} bytes")
