"""Users, roles and grants as the control group keeps them, held against a model that asks each grant in turn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.access import (
    AlterGroup,
    CreateGroup,
    CreateKey,
    CreateRole,
    CreateUser,
    DropGroup,
    DropRole,
    DropUser,
    RestoreAccess,
    RevokeKey,
    RotateKey,
    SetGrant,
    SetPassword,
    SetUserRole,
)
from cluster.catalog import CreateDatabase, DropDatabase, RenameCollection
from cluster.machine import Rejected
from cluster.message import to_plain
from cluster.privileges import BUILT_IN_GROUPS, LEVELS, PRIVILEGES_OF, Level, object_type_of
from storage.errors import InvalidParameter
from tests.cluster.controls import Driver, driver, new_collection, refused, restored


def grant(privilege: str, collection: str = "*", database: str = "*", *, kind: str = "", has: bool = True) -> SetGrant:
    return SetGrant("r", kind, collection, privilege, database, "root", has)


def with_user(*changes: Any) -> Driver:
    return driver(CreateUser("ann", "hash", ""), CreateRole("r", ""), SetUserRole("ann", "r", True), *changes)


def may(one: Driver, privilege: str, database: str = "default", name: str = "c") -> bool:
    rights = one.control.access.rights("ann")
    return rights is not None and rights.may(privilege, database, name)


def test_grants_go_with_their_collection() -> None:
    """A dropped collection takes its grants along, a renamed one keeps them; those on more than it stay."""
    one = with_user(
        grant("Insert", "c", "default"),
        grant("CollectionReadOnly", "c", "default"),
        grant("Delete", "c", "*"),
        grant("Flush", "*", "default"),
        grant("UpdateUser", "c", "default", kind="User"),
        grant("Load", "d", "default"),
        ("create_collection", "c", new_collection()),
        ("create_collection", "e", new_collection()),
    )
    assert one.say(RenameCollection("default", "c", "default", "d")) == {}
    assert may(one, "Insert", name="d") and may(one, "Query", name="d") and may(one, "Load", name="d")
    assert not may(one, "Insert") and not may(one, "Query") and may(one, "Delete") and may(one, "Flush", name="d")
    before = one.control.access.version
    assert one.carry("truncate_collection", "d") is not None and one.carry("drop_collection", "e") is not None
    assert may(one, "Insert", name="d") and one.control.access.version == before
    task = one.begin("drop_collection", "d")
    assert may(one, "Insert", name="d")
    one.end(task)
    one.carry("create_collection", "d", new_collection())
    after = restored(one.control).access
    assert after.to_plain() == one.control.access.to_plain()
    assert not any(may(one, privilege, name="d") for privilege in ("Insert", "Query", "Load", "Delete"))
    kept = {(each.object_type, each.database, each.object_name) for each in one.control.access.role("r").grants}
    assert kept == {("Collection", "*", "c"), ("Collection", "default", "*"), ("User", "default", "c")}


def test_grants_go_with_their_database() -> None:
    """Who might do something in a database may not do it in the next of its name; grants elsewhere stay."""
    one = with_user(
        CreateDatabase("sales", {}),
        grant("Insert", "*", "sales"),
        grant("Query", "c", "sales"),
        grant("DatabaseReadOnly", "*", "sales"),
        grant("Insert", "*", "default"),
        grant("Delete", "*", "*"),
    )
    assert may(one, "Insert", database="sales") and may(one, "Query", database="sales")
    one.say(DropDatabase("sales"))
    one.say(CreateDatabase("sales", {}))
    assert not may(one, "Insert", database="sales") and not may(one, "Query", database="sales")
    assert may(one, "Insert") and may(one, "Delete", database="sales")
    assert "sales" not in {each.database for each in restored(one.control).access.role("r").grants}


def test_a_restore_is_whole_or_not_at_all() -> None:
    """Users, roles, groups and grants come together; if one is refused nothing has changed, whatever was sent."""
    wanted = (
        CreateRole("r", "d"), CreateGroup("own"), AlterGroup("own", ["Insert"], True),
        grant("own", "c", "default"), CreateUser("ann", "hash", "x"), SetUserRole("ann", "r", True),
    )  # fmt: skip
    changes = [list(to_plain(one)) for one in wanted]
    one = driver()
    assert one.say(RestoreAccess(changes)) == {} and may(one, "Insert") and not may(one, "Delete")
    before = one.control.access.to_plain()
    assert refused(one.say(RestoreAccess(changes)), "invalid_parameter", "already exists")
    for wrong in (
        ["drop_user", ["ann"]], ["create_user", ["bob"]], ["create_user", ["bob", 1, ""]], ["create_user"], "x", 7,
        ["set_user_role", ["ann", "nothing", True]], ["alter_privilege_group", ["own", 5, True]], ["nothing", []],
    ):  # fmt: skip
        new = list(to_plain(CreateUser("bob", "hash", "")))
        assert isinstance(one.say(RestoreAccess([new, wrong])), Rejected)
        assert one.control.access.to_plain() == before
    assert restored(one.control).access.to_plain() == before


PRIVILEGES = ["Insert", "Search", "DescribeCollection", "CreateCollection", "ShowCollections", "FlushAll"]
PLACES = st.sampled_from(["a", "b", "*"])
GRANTS = st.tuples(st.sampled_from([*PRIVILEGES, "CollectionReadWrite", "DatabaseAdmin", "own"]), PLACES, PLACES)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(GRANTS, st.booleans()), max_size=12), st.sets(st.sampled_from(PRIVILEGES), max_size=3))
def test_what_a_user_may_do(steps: list[tuple[tuple[str, str, str], bool]], own: set[str]) -> None:
    """A user may do exactly what one of its grants says, whatever was granted before, also after a restart."""
    one = with_user(CreateGroup("own"), AlterGroup("own", sorted(own), True))
    one.say(SetGrant("public", "Global", "*", "DescribeCollection", "*", "root", False))
    model: set[tuple[str, str, str]] = set()
    for (privilege, database, name), has in steps:
        privileges = own if privilege == "own" else BUILT_IN_GROUPS.get(privilege, {privilege})
        levels = {LEVELS[each] for each in privileges}
        fits = not (Level.CLUSTER in levels and (database, name) != ("*", "*")) and not (
            Level.DATABASE in levels and name != "*"
        )
        outcome = one.say(grant(privilege, name, database, has=has))
        assert (outcome == {}) is (fits or not has)
        if outcome == {}:
            (model.add if has else model.discard)((privilege, database, name))
    for control in (one.control, restored(one.control)):
        rights = control.access.rights("ann")
        assert rights is not None
        for privilege in PRIVILEGES:
            for database in "ab":
                for name in "ab":
                    assert rights.may(privilege, database, name) is _says(model, own, privilege, database, name)


def _says(model: Iterable[tuple[str, str, str]], own: set[str], privilege: str, database: str, name: str) -> bool:
    return any(
        privilege in (own if given == "own" else BUILT_IN_GROUPS.get(given, {given}))
        and where in ("*", database)
        and which in ("*", name)
        for given, where, which in model
    )


def test_every_privilege_has_a_level_and_a_kind() -> None:
    """The kinds of objects share all privileges out; every privilege of a built-in group is one."""
    assert sum(len(names) for names in PRIVILEGES_OF.values()) == len(LEVELS)
    assert {object_type_of(one) for one in LEVELS} == set(PRIVILEGES_OF)
    assert all(group <= LEVELS.keys() for group in BUILT_IN_GROUPS.values())


def test_grants_by_kind_of_object() -> None:
    """The first form names the kind of object; `*` is every privilege of that kind and of no other."""
    one = with_user(grant("*", "c", "default", kind="Collection"))
    assert may(one, "Insert") and not may(one, "Insert", name="d") and not may(one, "CreateCollection")
    assert one.say(grant("All", kind="Global")) == {}
    assert may(one, "CreateCollection") and may(one, "FlushAll") and not may(one, "Insert", name="d")
    assert refused(one.say(grant("Insert", kind="Global")), "invalid_parameter", "privilege name[Insert]")
    assert refused(one.say(grant("Insert", kind="Table")), "invalid_parameter", "not found the object type")
    one.say(grant("SelectUser", "bob", kind="User"))
    rights = one.control.access.rights("ann")
    assert rights is not None and rights.may_user("SelectUser", "bob") and not rights.may_user("SelectUser", "eve")


def test_admin_root_and_nobody() -> None:
    """root and admins may do everything; who is no user has no rights; root stays."""
    one = with_user(SetUserRole("ann", "admin", True))
    assert may(one, "DropDatabase") and may(one, "OperateNodes", "x", "y")
    root = one.control.access.rights("root")
    assert root is not None and root.may("DropOwnership")
    assert one.control.access.rights("bob") is None
    assert refused(one.say(DropUser("root")), "not_permitted", "root")
    assert refused(one.say(DropRole("admin", True)), "not_permitted", "default role")
    one.say(SetUserRole("ann", "admin", False))
    assert not may(one, "DropDatabase")


def test_lists_show_where_a_user_may_do_something() -> None:
    """What everybody may do shows nobody anything."""
    one = with_user(grant("Search", "c", "d"))
    rights = one.control.access.rights("ann")
    assert rights is not None and rights.may("DescribeCollection", "default", "x")
    assert rights.sees("d") and rights.sees("d", "c") and not rights.sees("d", "x") and not rights.sees("default")


def test_passwords_change_from_what_they_were() -> None:
    """A change that was made for another password than the user has now is refused; a dropped user stays dropped."""
    one = with_user()
    assert one.say(SetPassword("ann", "next", "hash", "")) == {}
    assert refused(one.say(SetPassword("ann", "other", "hash", "")), "not_authenticated", "old password")
    assert one.say(SetPassword("root", "new", "", "")) == {}
    assert one.control.access.users["root"].password == "new"
    assert one.say(DropUser("ann")) == {} and one.say(DropUser("ann")) == {}
    assert "ann" not in restored(one.control).access.users


@pytest.mark.parametrize("name", ["", "1ann", "a b", "a" * 33, "ann\n", "a:b"])
def test_names_that_no_user_has(name: str) -> None:
    """Names are what fits in front of a colon."""
    assert refused(driver().say(CreateUser(name, "hash", "")), InvalidParameter.code, "invalid user name")


def test_twice_and_missing() -> None:
    """What is there cannot be created again, what is not there cannot be used."""
    one = with_user()
    assert refused(one.say(CreateUser("ann", "x", "")), "invalid_parameter", "user already exists")
    assert refused(one.say(CreateRole("public", "")), "invalid_parameter", "already exists")
    assert refused(one.say(SetUserRole("ann", "none", True)), "invalid_parameter", "not found the role")
    assert refused(one.say(SetUserRole("bob", "r", True)), "invalid_parameter", "not found the user")
    assert refused(one.say(grant("Fly")), "invalid_parameter", "not found the privilege name")
    one.say(grant("Search"))
    assert refused(one.say(DropRole("r", False)), "invalid_parameter", "has privileges")
    assert one.say(DropRole("r", True)) == {} and one.control.access.users["ann"].roles == ()


def test_groups_of_privileges() -> None:
    """A group that is granted is not dropped, grows for those who have it, and never beyond what its grants reach."""
    one = with_user(CreateGroup("own"), AlterGroup("own", ["Search", "Query"], True), grant("own", "c", "default"))
    assert may(one, "Query") and not may(one, "Insert")
    assert one.say(AlterGroup("own", ["Insert"], True)) == {} and may(one, "Insert")
    assert refused(one.say(AlterGroup("own", ["FlushAll"], True)), "invalid_parameter", "too little")
    assert one.say(AlterGroup("own", ["Query"], False)) == {} and not may(one, "Query")
    assert refused(one.say(DropGroup("own")), "invalid_parameter", "used by role")
    assert refused(one.say(CreateGroup("own")), "group_name_invalid", "own")
    assert refused(one.say(CreateGroup("ClusterAdmin")), "group_name_invalid", "ClusterAdmin")
    assert refused(one.say(AlterGroup("own", ["Fly"], True)), "invalid_parameter", "Fly")


def test_keys_come_and_go() -> None:
    """A rotated key has two digests for a while; a dropped user has none; expired ones make room."""
    one = with_user(CreateKey("k1", "ann", "d1", 0, ""), CreateKey("k2", "ann", "d2", 1, ""))
    assert one.say(RotateKey("k1", "d3", 0, 5_000)) == {}
    key = restored(one.control).access.keys["k1"]
    assert (key.digest, key.old_digest, key.old_until_ms) == ("d3", "d1", 5_000)
    assert one.say(CreateKey("k3", "ann", "d4", 0, "")) == {} and set(one.control.access.keys) == {"k1", "k3"}
    assert one.say(RevokeKey("k3")) == {} and set(one.control.access.keys) == {"k1"}
    assert refused(one.say(RevokeKey("k3")), "invalid_parameter", "no api key")
    assert refused(one.say(CreateKey("k4", "bob", "d", 0, "")), "invalid_parameter", "not found the user")
    one.say(DropUser("ann"))
    assert one.control.access.keys == {}


def test_no_secret_is_shown_by_a_refusal() -> None:
    """No refusal repeats what stands for a password or a key."""
    one = with_user()
    for message in (CreateUser("ann", "s3cr3t", ""), SetPassword("ann", "s3cr3t", "s3cr3t", "")):
        assert "s3cr3t" not in str(one.say(message))
