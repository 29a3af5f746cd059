"""Settings: four layers, every error at once, each naming where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from node.config import (
    OPTIONS,
    Address,
    LogFormat,
    Peer,
    Settings,
    SettingsError,
    StorageSettings,
    config_flags,
    describe,
    from_flags,
    load,
)
from node.members import own_facts

TOML = """
data = "/var/lib/annulus"
listen = "[::1]:7000"

[storage]
segment_bytes_max = "64MiB"
segment_idle_s_max = 5

[log]
format = "json"
"""


@pytest.fixture
def toml_file(tmp_path: Path) -> str:
    path = tmp_path / "annulus.toml"
    path.write_text(TOML)
    return str(path)


def problems(**layers: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(**{"flags": {}, "environment": {}, **layers})
    return [str(problem) for problem in caught.value.problems]


def test_defaults_need_nothing() -> None:
    """With no file, variable or flag the settings are the documented defaults."""
    settings = load(flags={}, environment={})
    assert settings == Settings()
    assert settings.node.listen == Address("127.0.0.1", 19530)
    assert settings.storage.segment_bytes_max == 256 << 20
    assert settings.sources == {}


def test_later_layers_win(toml_file: str) -> None:
    """default < file < environment < flag, value by value, and each value knows its source."""
    settings = load(
        flags={"listen": "0.0.0.0:9000", "name": None},
        environment={"ANNULUS_LISTEN": "127.0.0.1:8000", "ANNULUS_STORAGE_SEGMENT_IDLE_S_MAX": "7.5", "HOME": "/"},
        config_file=toml_file,
    )
    assert settings.node.data == "/var/lib/annulus"
    assert str(settings.node.listen) == "0.0.0.0:9000"
    assert settings.storage.segment_idle_s_max == 7.5
    assert settings.storage.segment_bytes_max == 64 << 20
    assert settings.log.format is LogFormat.JSON
    rows = {row.key: row for row in describe(settings)}
    assert rows["data"].source == f"file {toml_file}"
    assert rows["listen"].source == "flag --listen"
    assert rows["storage.segment_idle_s_max"].source == "environment ANNULUS_STORAGE_SEGMENT_IDLE_S_MAX"
    assert rows["name"].source == "default"
    assert (rows["storage.segment_bytes_max"].value, rows["storage.segment_bytes_max"].unit) == ("64MiB", "bytes")


def test_environment_may_name_the_file(toml_file: str) -> None:
    """ANNULUS_CONFIG names the file; a flag's file wins over it."""
    assert load(flags={}, environment={"ANNULUS_CONFIG": toml_file}).node.listen == Address("::1", 7000)
    named = problems(environment={"ANNULUS_CONFIG": toml_file}, config_file="/nowhere/a.toml")
    assert named == ["config: cannot read the file: No such file or directory (file /nowhere/a.toml)"]


def test_all_errors_at_once(tmp_path: Path) -> None:
    """Errors of every layer, and broken relations, come in one message that says where each value came from."""
    path = tmp_path / "bad.toml"
    path.write_text(
        "shards = true\nlisten = 5\n[storage]\nsegmnt_bytes_max = 1\njournal_bytes_max = '64MiB'\n[logg]\na = 1\n"
    )
    file = f"file {path}"
    assert problems(
        config_file=str(path),
        environment={"ANNULUS_API_BODY_BYTES_MAX": "lots", "ANNULUS_WORKERS_DISK_THREADS": "0"},
        flags={"log.level": "loud", "join": "nowhere"},
    ) == [
        f"shards: True is not a whole number (from {file})",
        f"listen: 5 is not an address; write HOST:PORT, or [IPV6]:PORT (from {file})",
        f"storage.segmnt_bytes_max: is not a setting; did you mean storage.segment_bytes_max? (from {file})",
        f"logg: is not a setting (from {file})",
        "api.body_bytes_max: 'lots' is not a size; write bytes, or a number with KiB, MiB or GiB"
        " (from environment ANNULUS_API_BODY_BYTES_MAX)",
        "workers.disk_threads: '0' is below the least allowed, 1 (from environment ANNULUS_WORKERS_DISK_THREADS)",
        "log.level: 'loud' is not one of debug, info, warning, error (from flag --log-level)",
        "join: 'nowhere' is not an address; write HOST:PORT, or [IPV6]:PORT (from flag --join)",
        "storage.journal_bytes_max: must be at least twice storage.journal_file_bytes_max:"
        " only whole files are cut, and one is being written"
        f" (storage.journal_bytes_max from {file}; storage.journal_file_bytes_max from default)",
    ]


@pytest.mark.parametrize(
    "key, text, value",
    [
        pytest.param("storage.segment_bytes_max", "1_048_576", 1 << 20, id="plain bytes"),
        pytest.param("storage.segment_bytes_max", "2 MiB", 2 << 20, id="unit"),
        pytest.param("api.accept_int64", "FALSE", False, id="bool"),
        pytest.param("listen", "db.example:1", Address("db.example", 1), id="host name"),
        pytest.param("peers", "n1=127.0.0.1:7000", (Peer("n1", Address("127.0.0.1", 7000)),), id="itself as only peer"),
        pytest.param("replication_factor", "1", 1, id="one copy"),
        pytest.param("data", "/tmp/with space", "/tmp/with space", id="path"),
    ],
)
def test_good_values(key: str, text: str, value: object) -> None:
    """Text from a flag becomes the typed value."""
    settings = load(flags={key: text}, environment={})
    section, _, name = key.rpartition(".")
    assert getattr(getattr(settings, section or "node"), name) == value


@pytest.mark.parametrize(
    "key, text, complaint",
    [
        pytest.param("storage.segment_bytes_max", "1MB", "is not a size", id="decimal unit"),
        pytest.param("storage.segment_bytes_max", "-1", "is not a size", id="negative size"),
        pytest.param("storage.checkpoint_interval_s", "nan", "is not a number of s", id="nan"),
        pytest.param("storage.checkpoint_interval_s", "1e999", "is not a number of s", id="infinity"),
        pytest.param("api.accept_int64", "1", "is neither true nor false", id="bool"),
        pytest.param("listen", "localhost:70000", "has a port above 65535", id="port"),
        pytest.param("listen", "::1:80", "is not an address", id="bare ipv6"),
        pytest.param("name", "-x", "is not a name", id="name"),
        pytest.param("data", " ", "is not a path", id="empty path"),
        pytest.param("shards", "1025", "is above the most allowed, 1024", id="too many"),
        pytest.param("peers", "n1=a:1,n1=b:2", "names a peer twice", id="peer twice"),
        pytest.param("peers", "a:1", "is not a list of peers", id="peer without name"),
        pytest.param("peers", "n1=a:1,n/2=b:2", "has a peer with the name 'n/2'", id="a peer's name"),
        pytest.param("peers", "n1=10.0.0.1:1,n2=127.0.0.1:2", "anybody may pose as a node", id="no secret"),
        pytest.param("peers", "n1=127.0.0.1:1,n2=127.0.0.1:1", "n1 and n2 have the same address", id="one address"),
        pytest.param("peers", "n1=127.0.0.1:1,n2=127.0.0.1:0", "has port 0", id="no port"),
        pytest.param("join", "127.0.0.1:1", "needs peer_listen too", id="join"),
        pytest.param("replaces", "n1", "only together with join", id="replaces"),
        pytest.param("replication_factor", "3", "one node can hold only one copy", id="copies"),
        pytest.param("cluster.repair_from_peers", "true", "has no peers", id="repair alone"),
        pytest.param("cluster.election_s_max", "0.6", "must be above cluster.election_s_min", id="election"),
        pytest.param("peer_listen", "a:1", "anybody may pose as a node", id="peer listen without proof"),
        pytest.param("peer_listen", "127.0.0.1:0", "is no address at which", id="peer listen anywhere"),
        pytest.param("peer_advertise", "127.0.0.1:9", "this one is alone", id="peer advertised to nobody"),
    ],
)
def test_bad_values(key: str, text: str, complaint: str) -> None:
    """A value that cannot be used gets one complaint, which names its key, what fits and its flag."""
    (problem,) = problems(flags={key: text})
    assert problem.startswith(f"{key}: ")
    assert complaint in problem
    assert "from flag --" + key.replace(".", "-").replace("_", "-") in problem


def test_secrets_are_never_shown() -> None:
    """Neither the listing nor an error shows a secret's value."""
    assert "hush" not in "".join(problems(flags={"cluster_secret": "hush"}))
    settings = load(flags={"cluster_secret": "hush" * 4, "peers": "n1=a:1"}, environment={})
    (row,) = [row for row in describe(settings) if row.key == "cluster_secret"]
    assert row.value == "********"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        pytest.param({"peer_listen": "127.0.0.1:1", "peers": "n1=127.0.0.1:1,n2=127.0.0.1:2"}, "both given", id="both"),
        pytest.param({"peer_listen": "0.0.0.0:1", "cluster_secret": "s" * 16}, "is no address at which", id="any"),
        pytest.param({"peer_listen": "127.0.0.1:1", "listen": "127.0.0.1:9"}, "own address", id="itself"),
        pytest.param({"peer_listen": "127.0.0.1:1", "replication_factor": "3"}, "is the cluster's", id="copies"),
        pytest.param({"peer_listen": "10.0.0.1:1"}, "anybody may pose", id="no secret"),
        pytest.param({"peer_listen": "127.0.0.1:1", "peer_advertise": "0.0.0.0:1"}, "is no address", id="any told"),
    ],
)
def test_a_node_that_joins_needs_an_address_and_no_list(flags: dict[str, str], complaint: str) -> None:
    """What a cluster has already is not given again, and others must find the node, and know it."""
    (problem,) = problems(flags={"join": "127.0.0.1:9", **flags})
    assert complaint in problem
    load(flags={"join": "127.0.0.1:9", "peer_listen": "127.0.0.1:1"}, environment={})
    inside = {"peer_listen": "0.0.0.0:1", "peer_advertise": "10.0.0.9:7", "cluster_secret": "s" * 16}
    contained = load(flags={"join": "127.0.0.1:9", **inside}, environment={})
    assert own_facts(contained.node)["peer"] == "10.0.0.9:7"
    restarted = load(flags={"peer_listen": "10.0.0.1:1", "cluster_secret": "s" * 16}, environment={})
    assert restarted.node.is_clustered and not load(flags={}, environment={}).node.is_clustered


PEERS = "n2=10.0.0.2:7000,n1=10.0.0.1:7000,n3=[fd00::3]:7000"


def test_a_cluster_from_a_file(tmp_path: Path) -> None:
    """Peers may be a table; members, copies and the peer address follow from them; the secret may be in a file."""
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef\n")
    secret.chmod(0o600)
    path = tmp_path / "a.toml"
    path.write_text(
        f'cluster_secret_file = "{secret}"\n'
        '[peers]\nn1 = "10.0.0.1:7000"\nn2 = "10.0.0.2:7000"\nn3 = "[fd00::3]:7000"\nn4 = "d:1"\n'
    )
    settings = load(flags={"name": "n3"}, environment={}, config_file=str(path))
    node = settings.node
    assert (node.members, node.copies) == (("n1", "n2", "n3", "n4"), 3)
    assert node.peer_address == Address("fd00::3", 7000)
    assert node.cluster_secret == "0123456789abcdef"
    rows = {row.key: row for row in describe(settings)}
    assert (rows["cluster_secret"].value, rows["cluster_secret"].source) == ("********", f"file {secret}")
    other = load(flags={"peer_listen": "0.0.0.0:7000", "peers": "n1=a:1", "cluster_secret": "s" * 16}, environment={})
    assert other.node.peer_address == Address("0.0.0.0", 7000)
    assert load(flags={}, environment={}).node.members == ("n1",)


def test_nodes_of_this_machine_need_no_secret() -> None:
    """Where nobody else reaches the peers, nothing has to be proved; two copies are warned of."""
    settings = load(flags={"peers": "n1=127.0.0.1:1,n2=localhost:2"}, environment={})
    assert settings.node.copies == 2
    assert "bear no loss" in settings.warnings[0]


def test_everything_wrong_with_a_cluster_is_said_at_once(tmp_path: Path) -> None:
    """Name, addresses, copies, times, secret and certificates: one start tells it all, with where it came from."""
    open_to_all = tmp_path / "secret"
    open_to_all.write_text("too short")
    open_to_all.chmod(0o644)
    flags = {
        "name": "n9",
        "peers": "n1=127.0.0.1:1,n2=127.0.0.1:1",
        "replication_factor": "3",
        "cluster.heartbeat_s": "0.2",
        "cluster.election_s_max": "0.1",
        "cluster_secret_file": str(open_to_all),
        "cluster.tls_key_file": "/nowhere/key",
    }
    assert [problem.partition(" (from ")[0] for problem in problems(flags=flags)] == [
        f"cluster_secret_file: {open_to_all} may be read by others than its owner; chmod 600 it",
        "cluster.tls_key_file: cannot read the file /nowhere/key: No such file or directory",
        "cluster.election_s_min: must be above three times cluster.heartbeat_s, else one late heartbeat costs a leader"
        " its place (cluster.election_s_min from default; cluster.heartbeat_s from flag --cluster-heartbeat-s)",
        "cluster.election_s_max: must be above cluster.election_s_min (cluster.election_s_max from flag"
        " --cluster-election-s-max; cluster.election_s_min from default)",
        "name: n9 is not among the peers n1, n2; it must be one of them (name from flag --name; peers from flag"
        " --peers)",
        "peers: n1 and n2 have the same address 127.0.0.1:1 (peers from flag --peers)",
        "replication_factor: 3 copies need as many nodes, and peers names 2 (replication_factor from flag"
        " --replication-factor; peers from flag --peers)",
        f"cluster_secret: is shorter than 16 characters; `openssl rand -hex 32` makes a good one (cluster_secret from"
        f" file {open_to_all})",
    ]


@pytest.mark.parametrize(
    "content, complaint",
    [
        pytest.param(b"", "holds no secret", id="empty"),
        pytest.param(b"\xff\xfe" * 20, "holds no secret", id="binary"),
        pytest.param(b"x" * 5000, "holds no secret", id="endless"),
        pytest.param(None, "cannot read the file", id="absent"),
    ],
)
def test_files_that_hold_no_secret(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    """A secret file that cannot serve is one problem that names the file."""
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    (problem,) = problems(flags={"peers": PEERS, "cluster_secret_file": str(path)})
    assert complaint in problem and str(path) in problem


def test_a_secret_given_twice() -> None:
    """Two secrets are refused, as only one of them can be meant."""
    found = problems(flags={"peers": PEERS, "cluster_secret": "s" * 16, "cluster_secret_file": "/nowhere/s"})
    assert "leave one of them out" in found[0]


def test_unknown_variables_are_only_warned_of() -> None:
    """Kubernetes sets ANNULUS_PORT beside a service of that name; a misspelt setting gets a suggestion."""
    settings = load(flags={}, environment={"ANNULUS_PORT": "tcp://10.0.0.1:19530", "ANNULUS_LISTN": "a:1"})
    assert settings.warnings == (
        "environment variable ANNULUS_LISTN is not a setting; did you mean ANNULUS_LISTEN?",
        "environment variable ANNULUS_PORT is not a setting",
    )


def test_settings_made_by_hand_are_checked_too() -> None:
    """A relation that does not hold is refused wherever the settings come from."""
    with pytest.raises(SettingsError, match="no segment ever fills"):
        Settings(storage=StorageSettings(segment_bytes_max=1 << 30, growing_bytes_max=1 << 20))


@pytest.mark.parametrize("text", ["a = ", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), "[storage"])
def test_files_that_are_no_toml(tmp_path: Path, text: str) -> None:
    """A broken file is one clear problem, not a stack trace."""
    path = tmp_path / "a.toml"
    path.write_bytes(text.encode("latin-1"))
    (problem,) = problems(config_file=str(path))
    assert problem.startswith("config: is not TOML: ")


def test_every_setting_is_described() -> None:
    """Each setting has a reason, three distinct spellings, and a number names its unit."""
    assert all(option.why for option in OPTIONS)
    for spelling in ("key", "variable", "flag"):
        assert len({getattr(option, spelling) for option in OPTIONS}) == len(OPTIONS)
    assert all(option.unit for option in OPTIONS if option.type in ("int", "float"))
    suffixed = [o for o in OPTIONS if o.unit in ("bytes", "s", "ms")]
    assert all(f"_{option.unit}" in option.name for option in suffixed)


def test_flags_of_a_command() -> None:
    """A click command takes one flag per setting and --config, and --help shows unit and default."""
    seen: list[Settings] = []

    @click.command()
    @config_flags
    def serve(**keywords: Any) -> None:
        seen.append(from_flags(keywords, {"ANNULUS_NAME": "n7"}))

    result = CliRunner().invoke(serve, ["--data", "/d", "--storage-segment-bytes-max", "1MiB"])
    assert result.exit_code == 0, result.output
    assert (seen[0].node.data, seen[0].node.name, seen[0].storage.segment_bytes_max) == ("/d", "n7", 1 << 20)
    shown = CliRunner().invoke(serve, ["--help"]).output
    assert "--peer-listen HOST:PORT" in shown
    assert "default 256MiB" in shown
    assert "--config FILE" in shown
