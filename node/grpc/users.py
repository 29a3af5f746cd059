"""Handlers of users, roles, grants and privilege groups. Clients send passwords in base64, as Milvus's do."""

from __future__ import annotations

from typing import Any, Final

from cluster.access import BUILT_IN_ROLES, ROOT, Grant, User
from node.grpc.calls import Call, Method, Methods
from node.grpc.protocol import enum
from node.guard import from_base64
from storage.errors import InvalidParameter

_ADD_USER: Final = enum("milvus.OperateUserRoleType")["AddUserToRole"]
_GRANT: Final = enum("milvus.OperatePrivilegeType")["Grant"]
_ADD: Final = enum("milvus.OperatePrivilegeGroupType")["AddPrivilegesToGroup"]


def _password(text: str) -> str:
    found = from_base64(text)
    if text and not found:
        raise InvalidParameter("a password is sent in base64: invalid parameter")
    return found


async def create_user(call: Call) -> None:
    request = call.request
    await call.service.access.create_user(request.username, _password(request.password), request.description)


async def update_user(call: Call) -> None:
    request = call.request
    old, new = _password(request.oldPassword), _password(request.newPassword)
    await call.service.access.update_password(request.username, old, new, request.description)


async def drop_user(call: Call) -> None:
    await call.service.access.drop_user(call.request.username)


async def list_users(call: Call) -> None:
    call.response.usernames.extend(await call.service.access.list_users())


async def select_user(call: Call) -> None:
    asked = call.request.user.name
    for name in [asked] if asked else await call.service.access.list_users():
        roles, description = await call.service.access.describe_user(name)
        shown = call.response.results.add(description=description)
        shown.user.name = name
        if call.request.include_role_info:
            for role in roles:
                shown.roles.add(name=role)


async def set_role(call: Call) -> None:
    request = call.request
    await call.service.access.set_role(request.username, request.role_name, request.type == _ADD_USER)


async def create_role(call: Call) -> None:
    await call.service.access.create_role(call.request.entity.name, call.request.entity.description)


async def alter_role(call: Call) -> None:
    await call.service.access.alter_role(call.request.role_name, call.request.description)


async def drop_role(call: Call) -> None:
    await call.service.access.drop_role(call.request.role_name, call.request.force_drop)


async def select_role(call: Call) -> None:
    asked = call.request.role.name
    for name in [asked] if asked else await call.service.access.list_roles():
        _, description, users = await call.service.access.describe_role(name)
        shown = call.response.results.add()
        shown.role.name, shown.role.description = name, description
        if call.request.include_user_info:
            for user in users:
                shown.users.add(name=user)


async def set_grant(call: Call) -> None:
    entity = call.request.entity
    await call.service.access.set_grant(
        entity.role.name,
        entity.grantor.privilege.name,
        entity.db_name or call.database,
        entity.object_name,
        object_type=entity.object.name or "?",
        has=call.request.type == _GRANT,
    )


async def set_grant_v2(call: Call) -> None:
    request = call.request
    await call.service.access.set_grant(
        request.role.name,
        request.grantor.privilege.name,
        call.database,
        request.collection_name or "*",
        has=request.type == _GRANT,
    )


async def select_grants(call: Call) -> None:
    entity = call.request.entity
    grants, _, _ = await call.service.access.describe_role(entity.role.name)
    for one in grants:
        if entity.object.name not in ("", one.object_type) or entity.object_name not in ("", "*", one.object_name):
            continue
        if entity.db_name not in ("", "*", one.database) and one.database != "*":
            continue
        _show_grant(call.response.entities.add(), entity.role.name, one)


def _show_grant(shown: Any, role: str, grant: Grant) -> None:
    shown.object_name, shown.db_name = grant.object_name, grant.database
    shown.role.name, shown.object.name = role, grant.object_type
    shown.grantor.user.name, shown.grantor.privilege.name = grant.grantor, grant.privilege


async def create_group(call: Call) -> None:
    await call.service.access.create_group(call.request.group_name)


async def drop_group(call: Call) -> None:
    await call.service.access.drop_group(call.request.group_name)


async def list_groups(call: Call) -> None:
    for name, privileges in (await call.service.access.list_groups()).items():
        shown = call.response.privilege_groups.add(group_name=name)
        for privilege in privileges:
            shown.privileges.add(name=privilege)


async def alter_group(call: Call) -> None:
    request = call.request
    names = [one.name for one in request.privileges]
    await call.service.access.alter_group(request.group_name, names, add=request.type == _ADD)


async def backup(call: Call) -> None:
    access = await call.service.access.backup()
    meta = call.response.RBAC_meta
    for user in access.users.values():
        if user.name != ROOT:
            shown = meta.users.add(user=user.name, password=user.password)
            for role in user.roles:
                shown.roles.add(name=role)
    for name, privileges in access.groups.items():
        group = meta.privilege_groups.add(group_name=name)
        for privilege in sorted(privileges):
            group.privileges.add(name=privilege)
    for name, held in access.roles.items():
        if name not in BUILT_IN_ROLES:
            meta.roles.add(name=name, description=held.description)
        for grant in held.grants:
            _show_grant(meta.grants.add(), name, grant)


async def restore(call: Call) -> None:
    meta = call.request.RBAC_meta
    await call.service.access.restore(
        [User(one.user, one.password, roles=tuple(role.name for role in one.roles)) for one in meta.users],
        [(one.name, one.description) for one in meta.roles],
        {one.group_name: [privilege.name for privilege in one.privileges] for one in meta.privilege_groups},
        [(one.role.name, _grant(one)) for one in meta.grants],
    )


def _grant(shown: Any) -> Grant:
    grantor = shown.grantor
    place = shown.object_name, grantor.privilege.name, shown.db_name or "default"
    return Grant(shown.object.name, *place, grantor.user.name)


METHODS: Final[Methods] = {
    "BackupRBAC": Method(backup),
    "RestoreRBAC": Method(restore, mutates=True),
    "CreateCredential": Method(create_user, mutates=True),
    "UpdateCredential": Method(update_user, mutates=True),
    "DeleteCredential": Method(drop_user, mutates=True),
    "ListCredUsers": Method(list_users),
    "SelectUser": Method(select_user),
    "OperateUserRole": Method(set_role, mutates=True),
    "CreateRole": Method(create_role, mutates=True),
    "AlterRole": Method(alter_role, mutates=True),
    "DropRole": Method(drop_role, mutates=True),
    "SelectRole": Method(select_role),
    "OperatePrivilege": Method(set_grant, mutates=True),
    "OperatePrivilegeV2": Method(set_grant_v2, mutates=True),
    "SelectGrant": Method(select_grants),
    "CreatePrivilegeGroup": Method(create_group, mutates=True),
    "DropPrivilegeGroup": Method(drop_group, mutates=True),
    "ListPrivilegeGroups": Method(list_groups),
    "OperatePrivilegeGroup": Method(alter_group, mutates=True),
}
