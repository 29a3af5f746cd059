"""Handlers of users, roles, privilege groups and API keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from node.api.calls import Call, Handler
from node.api.replies import success

Envelope = Mapping[str, Any]

# --- users -------------------------------------------------------------------------------------------------------


async def list_users(call: Call) -> Envelope:
    return success(await call.service.access.list_users())


async def describe_user(call: Call) -> Envelope:
    roles, description = await call.service.access.describe_user(call.values["userName"])
    return {**success(list(roles)), "description": description}


async def create_user(call: Call) -> Envelope:
    values = call.values
    await call.service.access.create_user(values["userName"], values["password"], values["description"])
    return success({})


async def update_password(call: Call) -> Envelope:
    values = call.values
    await call.service.access.update_password(
        values["userName"], values["password"], values["newPassword"], values["description"]
    )
    return success({})


async def drop_user(call: Call) -> Envelope:
    await call.service.access.drop_user(call.values["userName"])
    return success({})


async def grant_role(call: Call) -> Envelope:
    await call.service.access.set_role(call.values["userName"], call.values["roleName"], True)
    return success({})


async def revoke_role(call: Call) -> Envelope:
    await call.service.access.set_role(call.values["userName"], call.values["roleName"], False)
    return success({})


# --- roles -------------------------------------------------------------------------------------------------------


async def list_roles(call: Call) -> Envelope:
    return success(await call.service.access.list_roles())


async def describe_role(call: Call) -> Envelope:
    grants, description, _ = await call.service.access.describe_role(call.values["roleName"])
    shown = [
        {
            "objectType": one.object_type,
            "objectName": one.object_name,
            "privilege": one.privilege,
            "dbName": one.database,
            "grantor": one.grantor,
        }
        for one in grants
    ]
    return {**success(shown), "description": description}


async def create_role(call: Call) -> Envelope:
    await call.service.access.create_role(call.values["roleName"], call.values["description"])
    return success({})


async def alter_role(call: Call) -> Envelope:
    await call.service.access.alter_role(call.values["roleName"], call.values["description"])
    return success({})


async def drop_role(call: Call) -> Envelope:
    await call.service.access.drop_role(call.values["roleName"], call.values["forceDrop"])
    return success({})


async def grant_privilege(call: Call) -> Envelope:
    return await _set_grant(call, True)


async def revoke_privilege(call: Call) -> Envelope:
    return await _set_grant(call, False)


async def _set_grant(call: Call, has: bool) -> Envelope:
    values = call.values
    await call.service.access.set_grant(
        values["roleName"],
        values["privilege"],
        call.database,
        values["objectName"],
        object_type=values["objectType"],
        has=has,
    )
    return success({})


async def grant_privilege_v2(call: Call) -> Envelope:
    return await _set_grant_v2(call, True)


async def revoke_privilege_v2(call: Call) -> Envelope:
    return await _set_grant_v2(call, False)


async def _set_grant_v2(call: Call, has: bool) -> Envelope:
    values = call.values
    name = values["collectionName"] or "*"
    await call.service.access.set_grant(values["roleName"], values["privilege"], call.database, name, has=has)
    return success({})


# --- privilege groups --------------------------------------------------------------------------------------------


async def create_group(call: Call) -> Envelope:
    await call.service.access.create_group(call.values["privilegeGroupName"])
    return success({})


async def drop_group(call: Call) -> Envelope:
    await call.service.access.drop_group(call.values["privilegeGroupName"])
    return success({})


async def list_groups(call: Call) -> Envelope:
    groups = await call.service.access.list_groups()
    shown = [{"privilegeGroupName": name, "privileges": ",".join(found)} for name, found in groups.items()]
    return success({"privilegeGroups": shown})


async def add_to_group(call: Call) -> Envelope:
    values = call.values
    await call.service.access.alter_group(values["privilegeGroupName"], values["privileges"], add=True)
    return success({})


async def remove_from_group(call: Call) -> Envelope:
    values = call.values
    await call.service.access.alter_group(values["privilegeGroupName"], values["privileges"], add=False)
    return success({})


# --- API keys ----------------------------------------------------------------------------------------------------


async def create_api_key(call: Call) -> Envelope:
    values = call.values
    made = await call.service.access.create_key(values["userName"], _lifetime(call), values["description"])
    return success(made)


async def list_api_keys(call: Call) -> Envelope:
    return success(await call.service.access.list_keys(call.values["userName"]))


async def rotate_api_key(call: Call) -> Envelope:
    values = call.values
    return success(await call.service.access.rotate_key(values["keyId"], _lifetime(call), values["graceSeconds"]))


async def revoke_api_key(call: Call) -> Envelope:
    await call.service.access.revoke_key(call.values["keyId"])
    return success({})


def _lifetime(call: Call) -> int | None:
    seconds: int = call.values["lifetimeSeconds"]
    return None if seconds < 0 else seconds


HANDLERS: Final[Mapping[str, Handler]] = {
    one.__name__: one
    for one in (
        *(list_users, describe_user, create_user, update_password, drop_user, grant_role, revoke_role),
        *(list_roles, describe_role, create_role, alter_role, drop_role, grant_privilege, revoke_privilege),
        *(grant_privilege_v2, revoke_privilege_v2),
        *(create_group, drop_group, list_groups, add_to_group, remove_from_group),
        *(create_api_key, list_api_keys, rotate_api_key, revoke_api_key),
    )
}
