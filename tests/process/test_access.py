"""Authentication, privileges and the audit log on real nodes, over HTTP, gRPC and the command line."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from node.grpc.protocol import SERVICE, message, methods
from tests.process.clusters import Trio
from tests.process.running import PROGRAM, PROJECT, Running, check, clean_environment, free_port, until

AUTH = {"auth.enabled": "true", "auth.hash_cost": "8", "auth.delay_s_max": "0.2"}
ROOT = "root:a-root-password"


def ask(node: Running, path: str, token: str = ROOT, *, own: bool = False, **body: Any) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    full = ("/v2/annulus" if own else "/v2/vectordb") + path
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", node.port, timeout=60)) as connection:
        connection.request("POST", full, json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.load(answer)


def get(node: Running, path: str, token: str = "") -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"http://127.0.0.1:{node.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def done(found: tuple[int, dict[str, Any]]) -> Any:
    status, reply = found
    assert (status, reply["code"]) == (200, 0), found
    return reply["data"]


def command(node: Running, *words: str, token: str = "") -> subprocess.CompletedProcess[bytes]:
    environment = {**clean_environment(), **({"ANNULUS_TOKEN": token} if token else {})}
    line = [*PROGRAM, *words, "--address", f"127.0.0.1:{node.port}"]
    return subprocess.run(line, cwd=PROJECT, env=environment, capture_output=True, timeout=60)


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "root-password"
    path.write_text(ROOT.partition(":")[2])
    path.chmod(0o600)
    return path


def test_one_node(tmp_path: Path, password_file: Path) -> None:
    """Without credentials nothing but health is answered; with them what the privileges say; all of it is audited."""
    audit = tmp_path / "audit.jsonl"
    settings = {**AUTH, "auth.root_password_file": str(password_file), "auth.audit_file": str(audit)}
    with Running(tmp_path / "data", settings=settings) as node:
        assert [get(node, path) for path in ("/healthz", "/readyz")] == [200, 200]
        for path in ("/metrics", "/status", "/openapi.json", "/cluster/check", "/nothing", "/"):
            assert get(node, path) == 401, path
        for path in ("/collections/list", "/users/list", "/entities/search"):
            status, reply = ask(node, path, "")
            assert (status, reply["code"]) == (401, 1800)
        assert ask(node, "/nodes/entry", "", own=True)[0] == 401
        assert [get(node, path, ROOT) for path in ("/metrics", "/status", "/openapi.json")] == [200, 200, 200]
        assert get(node, "/nothing", ROOT) == 404
        assert command(node, "status").returncode == 1
        assert command(node, "status", token=ROOT).returncode == 0

        done(ask(node, "/collections/create", collectionName="c", dimension=2))
        done(ask(node, "/collections/create", collectionName="d", dimension=2))
        done(ask(node, "/users/create", userName="ann", password="secret-of-ann", description="reads"))
        assert ask(node, "/users/create", userName="ann", password="secret-of-ann")[1]["code"] == 1100
        assert ask(node, "/users/create", userName="bob", password="short")[1]["code"] == 1100
        done(ask(node, "/roles/create", roleName="reader"))
        done(ask(node, "/users/grant_role", userName="ann", roleName="reader"))
        done(
            ask(
                node,
                "/roles/grant_privilege_v2",
                roleName="reader",
                privilege="CollectionReadOnly",
                dbName="default",
                collectionName="c",
            )
        )
        done(
            ask(
                node,
                "/roles/grant_privilege",
                roleName="reader",
                objectType="Collection",
                objectName="c",
                privilege="Insert",
            )
        )
        ann = "ann:secret-of-ann"
        assert done(ask(node, "/collections/list", ann)) == ["c"]
        done(ask(node, "/entities/insert", ann, collectionName="c", data=[{"id": 1, "vector": [1.0, 2.0]}]))
        assert done(ask(node, "/entities/search", ann, collectionName="c", data=[[1.0, 2.0]]))
        for path, body in (
            ("/entities/search", {"collectionName": "d", "data": [[1.0, 2.0]]}),
            ("/entities/delete", {"collectionName": "c", "filter": "id > 0"}),
            ("/collections/drop", {"collectionName": "c"}),
            ("/users/list", {}),
            ("/users/describe", {"userName": "root"}),
            ("/roles/grant_privilege_v2", {"roleName": "reader", "privilege": "ClusterAdmin"}),
        ):
            status, reply = ask(node, path, ann, **body)
            assert (status, reply["code"]) == (403, 1401), (path, reply)
        assert get(node, "/metrics", ann) == 403
        assert done(ask(node, "/users/describe", ann, userName="ann")) == ["reader"]
        grants = done(ask(node, "/roles/describe", roleName="reader"))
        assert {one["privilege"] for one in grants} == {"CollectionReadOnly", "Insert"}

        key = done(ask(node, "/api_keys/create", ann, own=True, lifetimeSeconds=1000, description="ci"))
        assert done(ask(node, "/collections/list", key["apiKey"])) == ["c"]
        (listed,) = done(ask(node, "/api_keys/list", ann, own=True))
        assert listed["keyId"] == key["keyId"] and key["apiKey"] not in json.dumps(listed)
        assert ask(node, "/api_keys/create", ann, own=True, userName="root")[0] == 403
        again = done(ask(node, "/api_keys/rotate", ann, own=True, keyId=key["keyId"]))
        assert ask(node, "/collections/list", key["apiKey"])[0] == 401
        assert done(ask(node, "/collections/list", again["apiKey"])) == ["c"]
        done(ask(node, "/api_keys/revoke", ann, own=True, keyId=key["keyId"]))

        change: dict[str, Any] = {"userName": "ann", "newPassword": "another"}
        assert ask(node, "/users/update_password", ann, password="wrong", **change)[1]["code"] == 1400
        until(lambda: ask(node, "/users/update_password", ann, password="secret-of-ann", **change)[0] == 200)
        assert ask(node, "/collections/list", ann)[0] == 401
        node.restart()
        assert done(ask(node, "/collections/list", "ann:another")) == ["c"]
        done(ask(node, "/users/drop", userName="ann"))
        assert ask(node, "/collections/list", "ann:another")[0] in (401, 429)
        assert node.stop() == 0
        text = audit.read_text() + node.log.read_text()
        lines = [json.loads(line) for line in audit.read_text().splitlines()]
        assert {"/v2/vectordb/users/create", "/v2/vectordb/collections/drop"} <= {one["operation"] for one in lines}
        assert any(one["who"] == "ann" and one["outcome"] == "refused" for one in lines)
        for secret in ("secret-of-ann", "another", key["apiKey"], ROOT.partition(":")[2]):
            assert secret not in text
        status, said = check(tmp_path / "data")
        assert status == 0 and "scrypt" not in said


def test_pymilvus(tmp_path: Path, password_file: Path) -> None:
    """Milvus's own client makes users and roles, and is held to them; the audit log knows where it is."""
    audit = tmp_path / "audit.jsonl"
    pymilvus = pytest.importorskip("pymilvus")
    refused = (pymilvus.MilvusException, pytest.importorskip("grpc").RpcError)
    settings = {**AUTH, "auth.root_password_file": str(password_file), "auth.audit_file": str(audit)}
    with Running(tmp_path / "data", settings=settings) as node:
        uri = f"http://127.0.0.1:{node.port}"
        with pytest.raises(refused):
            pymilvus.MilvusClient(uri, timeout=5).list_collections()
        grpc = pytest.importorskip("grpc")
        with grpc.insecure_channel(f"127.0.0.1:{node.port}") as channel:
            for name in [*methods(), "Nothing"]:
                for metadata in ((), (("sourceid", "QHBAfmAjJCVeJiopXw=="),), (("authorization", "bm9ib2R5"),)):
                    with pytest.raises(grpc.RpcError) as error:
                        channel.unary_unary(f"/{SERVICE}/{name}")(b"", metadata=metadata)
                    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED, name
                    if metadata and name != "Search":
                        break
        root = pymilvus.MilvusClient(uri, token=ROOT)
        root.create_collection("c", dimension=2)
        root.create_user("ann", "secret-of-ann")
        root.create_role("reader")
        root.grant_role("ann", "reader")
        root.grant_privilege_v2("reader", "CollectionReadOnly", "c", "default")
        root.create_privilege_group("own")
        root.add_privileges_to_group("own", ["Insert", "Delete"])
        root.grant_privilege_v2("reader", "own", "c", "default")
        assert set(root.list_users()) == {"root", "ann"}
        assert {"admin", "public", "reader"} <= set(root.list_roles())
        assert list(root.describe_user("ann")["roles"]) == ["reader"]
        assert {one["privilege"] for one in root.describe_role("reader")["privileges"]} == {"CollectionReadOnly", "own"}
        ann = pymilvus.MilvusClient(uri, user="ann", password="secret-of-ann")
        ann.insert("c", [{"id": 1, "vector": [1.0, 2.0]}])
        assert ann.search("c", [[1.0, 2.0]], limit=1)[0]
        with pytest.raises(refused, match="permission deny"):
            ann.drop_collection("c")
        root.update_password("ann", "secret-of-ann", "another-secret", reset_connection=False)
        with pytest.raises(refused):
            ann.list_collections()
        root.drop_user("ann")
        assert root.list_users() == ["root"]
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert {"CreateCollection", "DropCollection", "DeleteCredential", "Search"} <= {one["operation"] for one in lines}
    assert {one["address"] for one in lines} == {"127.0.0.1"}


def test_users_and_roles_are_copied(tmp_path: Path, password_file: Path) -> None:
    """What BackupRBAC gives, RestoreRBAC makes on another node, with passwords that are good there; once, and whole."""
    grpc = pytest.importorskip("grpc")
    settings = {**AUTH, "auth.root_password_file": str(password_file)}
    shown = (("authorization", f"Bearer {ROOT}"),)

    def rbac(node: Running, method: str, body: bytes) -> bytes:
        with grpc.insecure_channel(f"127.0.0.1:{node.port}") as channel:
            answer: bytes = channel.unary_unary(f"/{SERVICE}/{method}")(body, metadata=shown, timeout=60)
            return answer

    meta = message("milvus.BackupRBACMetaResponse")
    with Running(tmp_path / "old", settings=settings) as old, Running(tmp_path / "new", settings=settings) as new:
        done(ask(old, "/users/create", userName="ann", password="secret-of-ann"))
        done(ask(old, "/roles/create", roleName="reader"))
        done(ask(old, "/users/grant_role", userName="ann", roleName="reader"))
        done(ask(old, "/privilege_groups/create", privilegeGroupName="own"))
        given: dict[str, Any] = {"privilegeGroupName": "own", "privileges": ["Insert"]}
        done(ask(old, "/privilege_groups/add_privileges_to_group", **given))
        for privilege in ("own", "Query", "CollectionReadOnly"):
            grant: dict[str, Any] = {
                "roleName": "reader",
                "privilege": privilege,
                "collectionName": "c",
                "dbName": "default",
            }
            done(ask(old, "/roles/grant_privilege_v2", **grant))
        backup = meta.FromString(rbac(old, "BackupRBAC", b""))
        assert [user.user for user in backup.RBAC_meta.users] == ["ann"]
        request = message("milvus.RestoreRBACMetaRequest")(RBAC_meta=backup.RBAC_meta).SerializeToString()
        status = message("common.Status").FromString
        assert status(rbac(new, "RestoreRBAC", request)).code == 0
        assert meta.FromString(rbac(new, "BackupRBAC", b"")).RBAC_meta == backup.RBAC_meta
        done(ask(new, "/collections/create", collectionName="c", dimension=2))
        row: dict[str, Any] = {"collectionName": "c", "data": [{"id": 1, "vector": [1, 2]}]}
        assert done(ask(new, "/entities/insert", "ann:secret-of-ann", **row))["insertCount"] == 1
        assert status(rbac(new, "RestoreRBAC", request)).code == 1100
        backup.RBAC_meta.users[0].user, backup.RBAC_meta.users[0].password = "bob", "$2a$10$foreign"
        request = message("milvus.RestoreRBACMetaRequest")(RBAC_meta=backup.RBAC_meta).SerializeToString()
        assert "create the user anew" in status(rbac(new, "RestoreRBAC", request)).reason


def test_three_nodes(tmp_path: Path, password_file: Path) -> None:
    """A password that is changed on one node is refused by others at once; dropped users stay dropped; nodes join."""
    with Trio(tmp_path / "three", settings={**AUTH, "auth.root_password_file": str(password_file)}) as trio:
        one, three = trio["n1"], trio["n3"]
        for name in ("ann", "bob"):
            done(ask(one, "/users/create", userName=name, password="password-1"))
            assert done(ask(three, "/collections/list", f"{name}:password-1")) == []
        for number in range(1, 6):
            old, new = f"password-{number}", f"password-{number + 1}"
            done(ask(one, "/users/update_password", userName="ann", password=old, newPassword=new))
            assert ask(three, "/collections/list", f"ann:{old}")[0] in (401, 429)
            assert done(ask(trio["n2"], "/collections/list", f"ann:{new}")) == []
        assert command(three, "status", token=ROOT).returncode == 0
        assert command(three, "node", "list", token=ROOT).returncode == 0
        assert command(three, "node", "list").returncode == 1
        joining = {
            "name": "n4",
            "peer_listen": f"127.0.0.1:{free_port()}",
            "join": f"127.0.0.1:{trio['n2'].port}",
            "cluster_secret_file": str(trio.secret),
            "auth.root_password_file": str(password_file),
        }
        with Running(tmp_path / "n4", settings={**AUTH, **joining}) as four:
            assert done(ask(four, "/collections/list", "ann:password-6")) == []
            assert ask(four, "/collections/list", "ann:password-5")[0] in (401, 429)
        done(ask(three, "/users/drop", userName="bob"))
        assert ask(one, "/collections/list", "bob:password-1")[0] in (401, 429)
        for node in trio:
            node.kill()
        trio.start()
        assert done(ask(one, "/users/list")) == ["root", "ann"]
        assert ask(three, "/collections/list", "bob:password-1")[0] in (401, 429)
