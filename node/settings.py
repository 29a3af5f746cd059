"""Every setting of a node: its unit, its default, and why it is so.

Frozen dataclasses, one per concern, passed down by value; nothing looks one up. `node/config.py` fills them from file,
environment and flags. The settings of `NodeSettings` have no section: their key is their name. The key of any other is
section and name, as in `storage.segment_bytes_max`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from ipaddress import ip_address
from typing import Any, Final, NamedTuple

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
COPIES: Final = 3
"""Copies of each shard where nobody asks for another number: one node may be lost, and writes go on."""
SECRET_CHARS_MIN: Final = 16
MEMORY_BYTES_MIN: Final = 192 * MIB


class Address(NamedTuple):
    host: str
    port: int

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it. A host name other than localhost may be anybody's."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def is_any(self) -> bool:
        """Whether it stands for all addresses of this machine: good to listen on, not to be found at."""
        try:
            return ip_address(self.host).is_unspecified
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Return the address in `host:port`. Raises ValueError, which says what was expected."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]/@]+)):([0-9]{1,5})", text.strip())
    if not found:
        raise ValueError("is not an address; write HOST:PORT, or [IPV6]:PORT")
    port = int(found[3])
    if port > 65_535:
        raise ValueError("has a port above 65535")
    return Address(found[1] or found[2], port)


class Peer(NamedTuple):
    name: str
    address: Address

    def __str__(self) -> str:
        return f"{self.name}={self.address}"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    AUTO = "auto"
    TEXT = "text"
    JSON = "json"


def setting(
    default: Any, unit: str, why: str, *, least: float | None = None, most: float | None = None, secret: bool = False
) -> Any:
    """Declare a setting: `unit` is for people and for parsing ("bytes" takes 64MiB), `why` says what it does and why.

    least, most  bounds of a number, both allowed; a secret is never shown.
    """
    return field(
        default=default,
        metadata={"unit": unit, "why": why, "least": least, "most": most, "secret": secret},
        kw_only=True,
    )


@dataclass(frozen=True)
class NodeSettings:
    """Who this node is and where it lives."""

    data: str = setting("./annulus-data", "path", "directory that holds everything the node keeps; one node at a time")
    listen: Address = setting(
        Address("127.0.0.1", 19530),
        "host:port",
        "address for clients; Milvus's port, and this machine only until told otherwise",
    )
    name: str = setting("n1", "", "this node's name, unique in its cluster and the same after every restart")
    shards: int = setting(
        8, "shards", "logs that writes are spread over; fixed when the data directory is first made", least=1, most=1024
    )
    peer_listen: Address | None = setting(
        None, "host:port", "address for other nodes; left out, this node's own in peers"
    )
    peer_advertise: Address | None = setting(
        None,
        "host:port",
        "address at which other nodes find this one, where that is another one: behind NAT, in a container",
    )
    peers: tuple[Peer, ...] = setting(
        (), "name=host:port,...", "nodes that form a cluster with their addresses for each other, the same list on each"
    )
    join: Address | None = setting(
        None,
        "host:port",
        "client address of any node of the cluster to join; not looked at once this node belongs to it",
    )
    replaces: str = setting("", "", "with join: name of the node whose shards this one takes over, so that it can go")
    zone: str = setting("", "", "rack, room or site; copies of a shard are in different ones while there are enough")
    replication_factor: int | None = setting(
        None, "nodes", "copies of each shard; left out, three or as many as there are nodes", least=1, most=7
    )
    cluster_secret: str = setting(
        "", "", "proves the nodes of a cluster to each other; the same on each, 16 characters or more", secret=True
    )
    cluster_secret_file: str = setting(
        "", "path", "file with the secret, which only its owner may read: keeps it out of process lists"
    )

    @property
    def members(self) -> tuple[str, ...]:
        """Names of all nodes of the cluster, this one included, in order; a node without peers is alone."""
        return tuple(sorted(peer.name for peer in self.peers)) or (self.name,)

    @property
    def has_peers(self) -> bool:
        return len(self.members) > 1

    @property
    def is_clustered(self) -> bool:
        """Whether these are settings of a node with peers: it forms a cluster, joins one, or has done so before."""
        return self.has_peers or (not self.peers and (self.join or self.peer_listen) is not None)

    @property
    def copies(self) -> int:
        """How many nodes hold each shard."""
        return self.replication_factor or min(COPIES, len(self.members))

    @property
    def peer_address(self) -> Address | None:
        """Where this node listens for other nodes; None if it is alone."""
        return self.peer_listen or next((peer.address for peer in self.peers if peer.name == self.name), None)


@dataclass(frozen=True)
class ClusterSettings:
    """How the nodes of a cluster deal with each other."""

    heartbeat_s: float = setting(
        0.15,
        "s",
        "a leader with nothing to say says so this often; shorter costs CPU for each shard",
        least=0.01,
        most=60,
    )
    election_s_min: float = setting(
        0.6, "s", "followers that have heard nothing for so long choose a new leader; longer bears longer pauses",
        least=0.05, most=600,
    )  # fmt: skip
    election_s_max: float = setting(
        1.0, "s", "each waits a random time up to this, so that they do not all stand at once", least=0.06, most=900
    )
    transfer_bytes_per_s_max: int = setting(
        256 * MIB, "bytes", "what a node that catches up takes from the others each second, at most", least=64 * KIB
    )
    dead_after_s: float = setting(
        600.0, "s", "copies of a node that is away for so long are rebuilt on others; it is back in time if it can",
        least=1,
    )  # fmt: skip
    moves_max: int = setting(
        4, "shards", "how many are on the move to other nodes at the same time", least=1, most=1024
    )
    repair_from_peers: bool = setting(
        False, "", "at a start with damaged data, move it aside and take everything from the other nodes"
    )
    tls_certificate_file: str = setting("", "path", "PEM certificate of this node; turns on TLS between nodes")
    tls_key_file: str = setting("", "path", "PEM key of the certificate, which only its owner may read")
    tls_ca_file: str = setting("", "path", "PEM certificates that the other nodes' are signed by")


@dataclass(frozen=True)
class StorageSettings:
    """When rows are sealed, saved and refused."""

    segment_bytes_max: int = setting(
        256 * MIB,
        "bytes",
        "a growing segment of this size is sealed; larger ones search faster per row and take longer to build",
        least=1 * KIB,
    )
    segment_age_s_max: float = setting(
        600.0, "s", "a growing segment is sealed this long after its first row, so that its rows get an index", least=1
    )
    segment_idle_s_max: float = setting(
        30.0,
        "s",
        "a growing segment is sealed when no row has come for this long: a load that ended is indexed",
        least=1,
    )
    growing_bytes_max: int = setting(
        1 * GIB, "bytes", "all growing segments together; above it the largest are sealed: bounds memory", least=1 * KIB
    )
    growing_low_ratio: float = setting(
        0.5, "ratio", "of growing_bytes_max: so much is left when the largest were sealed", least=0.01, most=0.99
    )
    checkpoint_interval_s: float = setting(
        60.0, "s", "at most this much log, in time, is replayed at a restart", least=0.1
    )
    journal_file_bytes_max: int = setting(
        64 * MIB, "bytes", "the journal is cut by whole files of this size", least=4 * KIB, most=2 * GIB
    )
    journal_bytes_max: int = setting(
        1 * GIB, "bytes", "a journal of this size makes a checkpoint at once: bounds disk and restart", least=8 * KIB
    )
    disk_reserve_bytes: int = setting(
        256 * MIB,
        "bytes",
        "below this much free disk the node refuses writes and stays readable; room to compact and checkpoint",
        least=0,
    )


@dataclass(frozen=True)
class CompactionSettings:
    """When sealed segments are rewritten."""

    small_segment_fill_ratio: float = setting(
        0.5,
        "ratio",
        "a sealed segment below this share of segment_bytes_max is small, and merged with others",
        least=0.01,
        most=0.8,  # from 0.85 on a segment counts as full
    )
    deleted_ratio: float = setting(
        0.2,
        "ratio",
        "a segment with at least this share of deleted or expired rows is rewritten without them",
        least=0.01,
        most=1,
    )
    segments_min: int = setting(
        4,
        "segments",
        "small segments are merged when there are this many: fewer rewrites of the same rows",
        least=2,
        most=30,  # as many are merged at once
    )
    interval_s: float = setting(10.0, "s", "how often segments are looked at", least=0.1)
    priority: int = setting(
        2,
        "rank",
        "compactions wait for a thread of workers.build_threads in this order: smaller numbers first",
        least=0,
        most=9,
    )


@dataclass(frozen=True)
class HealingSettings:
    """How replicas are compared, and damage is looked for."""

    compare_interval_s: float = setting(
        600.0,
        "s",
        "how often a shard's leader compares the states of its replicas; costs one log entry each",
        least=0.1,
    )
    scrub_interval_s: float = setting(
        86_400.0, "s", "how often a node reads all its chunks again: a disk that lies is found by reading", least=0.1
    )
    scrub_bytes_per_s_max: int = setting(
        8 * MIB, "bytes", "what that reading takes from the disk each second, at most", least=4 * KIB
    )
    check_bytes_per_s_max: int = setting(
        128 * MIB, "bytes", "the same when somebody waits for it, as `annulus check --cluster` does", least=4 * KIB
    )


@dataclass(frozen=True)
class IndexSettings:
    """How vector indexes are built."""

    build_threads: int = setting(
        0, "threads", "native threads of one index build; 0 takes every core, as a build is what the rest waits for",
        least=0, most=1024,
    )  # fmt: skip
    priority: int = setting(
        1,
        "rank",
        "the same for index builds, which come first: searches are exact and slow until then",
        least=0,
        most=9,
    )
    upgrade: bool = setting(
        True, "", "indexes that an older version of an engine made are built anew in the background"
    )
    rows_min: int = setting(
        1024, "rows", "a segment with fewer rows gets no index: exact search is as fast there, and exact", least=0
    )


@dataclass(frozen=True)
class WorkerSettings:
    """How many threads work beside the event loop."""

    disk_threads: int = setting(2, "threads", "for fsync and LevelDB; they wait rather than compute", least=1, most=64)
    search_threads: int = setting(
        2, "threads", "for searches and queries; more than the cores only adds switching", least=1, most=256
    )
    build_threads: int = setting(
        1, "threads", "index builds and compactions at the same time; a build has threads of its own", least=1, most=64
    )
    build_nice: int = setting(
        10, "nice", "builds give way to searches: the system's own scale, 0 for not at all, 19 for all but idle cores",
        least=0, most=19,
    )  # fmt: skip


@dataclass(frozen=True)
class AdmissionSettings:
    """How much is taken on at a time, and what happens to the rest: it waits, and what waits too long is refused."""

    memory_bytes_max: int = setting(
        0, "bytes", "what the process may hold; 0 is three quarters of the machine's memory, or of the container's",
        least=0,
    )  # fmt: skip
    memory_slow_ratio: float = setting(
        0.8, "ratio", "of memory_bytes_max: from here on inserts of those who write most are slowed", least=0.01, most=1
    )
    memory_high_ratio: float = setting(
        0.9, "ratio", "of memory_bytes_max: from here on they are refused; the rest is for the others", least=0.01,
        most=1,
    )  # fmt: skip
    memory_low_ratio: float = setting(
        0.75, "ratio", "of memory_bytes_max: below this they are taken again at once", least=0.01, most=1
    )
    unflushed_ratio_max: float = setting(
        2.0,
        "ratio",
        "rows that are in no chunk yet, in times storage.growing_bytes_max: inserts are slowed from 1 on, refused here",
        least=1.1,
        most=100,
    )
    request_bytes_max: int = setting(
        256 * MIB, "bytes", "bodies of inserts and upserts between arrival and answer; more wait", least=64 * KIB
    )
    log_bytes_max: int = setting(
        48 * MIB, "bytes", "rows between the log and the state of the shards led here; more wait", least=16 * KIB,
        most=56 * MIB,  # a group takes 64 MiB, and the rest is for deletes and the changes of segments
    )  # fmt: skip
    reads_max: int = setting(256, "reads", "searches, queries and gets at a time; more wait", least=2)
    share_ratio: float = setting(
        0.75, "ratio", "of each of these, what one collection gets alone; several share it evenly", least=0.1, most=0.95
    )
    wait_s_max: float = setting(5.0, "s", "what waits longer is refused", least=0.001, most=600)
    standing_wait_s_max: float = setting(
        2.0, "s", "the same where a queue has stood for wait_s_max: to wait longer would help nobody", least=0.001,
        most=600,
    )  # fmt: skip


@dataclass(frozen=True)
class ApiSettings:
    """What clients may ask and how answers look."""

    body_bytes_max: int = setting(
        64 * MIB, "bytes", "a larger request body is refused while it arrives; Milvus's limit", least=1 * KIB, most=GIB
    )
    request_timeout_s: float = setting(
        30.0, "s", "a request without a Request-Timeout header gets this long; Milvus's default", least=0.1, most=3600
    )
    tls_certificate_file: str = setting(
        "", "path", "PEM certificate that clients are shown, then those that it is signed by; turns on TLS for clients"
    )
    tls_key_file: str = setting("", "path", "PEM key of that certificate, which only its owner may read")
    tls_client_ca_file: str = setting(
        "", "path", "PEM certificates: clients must show one that these have signed; without it, none is asked for"
    )
    tls_ca_file: str = setting(
        "", "path", "to join a cluster: PEM certificates that its nodes' for clients are signed by; else the system's"
    )
    requests_running_max: int = setting(
        1024, "requests", "more at the same time are refused at once: a quick refusal instead of a slow death", least=1
    )
    collections_max: int = setting(
        65_536, "collections", "more are refused: each costs memory in every shard; Milvus's limit", least=1
    )
    drain_s_max: float = setting(10.0, "s", "at SIGTERM running requests get this long to finish", least=0, most=600)
    accept_int64: bool = setting(
        True, "", "Int64 values are JSON numbers unless a client asks for strings (Accept-Type-Allow-Int64)"
    )
    standard_error_status: bool = setting(
        False, "", "errors have HTTP statuses of their own instead of 200, which Milvus's clients expect"
    )
    legacy_array_response: bool = setting(
        False, "", "Array values in the nested shape that clients up to Milvus 2.6 parse"
    )
    legacy_json_response: bool = setting(
        False, "", "JSON values as strings, as clients up to Milvus 2.6 parse them"
    )  # fmt: skip


@dataclass(frozen=True)
class ImportSettings:
    """Files that clients may have this node import."""

    directory: str = setting("", "path", "they are below it, links followed; no import jobs if empty")


@dataclass(frozen=True)
class AuthSettings:
    """Who may ask, and what is written down of it. The same on every node of a cluster."""

    enabled: bool = setting(
        False, "", "nothing but health is answered without credentials; off unless told otherwise, as in Milvus"
    )
    root_password: str = setting(
        "Milvus", "", "of the user root until it is changed; Milvus's, which everybody knows", secret=True
    )
    root_password_file: str = setting("", "path", "file with that password, which only its owner may read")
    token_s: float = setting(
        86_400.0, "s", "an API key lives so long if whoever makes it does not say how long", least=1
    )
    cache_s: float = setting(
        300.0, "s", "credentials that were right are not looked at again for so long, unless they change", least=0
    )
    hash_cost: int = setting(
        15, "power", "looking at a password takes 2 to this power KiB of memory, and time to match", least=4, most=20
    )
    delay_s_max: float = setting(
        30.0, "s", "who fails again and again waits twice as long each time, at most this long", least=0.1, most=3600
    )
    audit_file: str = setting("", "path", "audit log, one JSON object a line; none if empty")
    audit_reads: bool = setting(False, "", "it has reads and writes of rows too, not only changes and refusals")
    audit_bytes_max: int = setting(
        64 * MIB, "bytes", "an audit file of this size is followed by another", least=4 * KIB
    )
    audit_files_max: int = setting(8, "files", "older audit files that are kept", least=1, most=1000)


@dataclass(frozen=True)
class LogSettings:
    """What is written down about the node's life."""

    level: LogLevel = setting(LogLevel.INFO, "", "least severe lines that are written")
    format: LogFormat = setting(LogFormat.AUTO, "", "auto is text on a terminal and JSON otherwise")
    loop_stall_ms: float = setting(
        20.0, "ms", "a longer pause of the event loop is logged and counted: everybody waited", least=1, most=10_000
    )


@dataclass(frozen=True)
class Settings:
    """All settings of one node. Built by `load` with their sources, or directly (in tests) with defaults."""

    node: NodeSettings = NodeSettings()
    cluster: ClusterSettings = ClusterSettings()
    storage: StorageSettings = StorageSettings()
    compaction: CompactionSettings = CompactionSettings()
    healing: HealingSettings = HealingSettings()
    index: IndexSettings = IndexSettings()
    workers: WorkerSettings = WorkerSettings()
    admission: AdmissionSettings = AdmissionSettings()
    api: ApiSettings = ApiSettings()
    imports: ImportSettings = ImportSettings()
    auth: AuthSettings = AuthSettings()
    log: LogSettings = LogSettings()
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Key -> where the value came from, for every setting that is not a default."""
    warnings: tuple[str, ...] = field(default=(), compare=False)
    """What looked odd but is no error; logged at start."""

    def __post_init__(self) -> None:
        problems = [*_out_of_bounds(self), *_broken_relations(self)]
        if problems:
            raise SettingsError(problems)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the settings: which key, what about it, and where each value involved came from."""

    key: str
    text: str
    source: str = ""
    involved: tuple[str, ...] = ()
    """Keys of the settings that a broken relation is between."""

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" + (f" ({self.source})" if self.source else "")


class SettingsError(ValueError):
    """The settings cannot be used; names every problem at once, so that they are mended in one go."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{count} in the settings", *(f"  {problem}" for problem in problems)]))


@dataclass(frozen=True)
class Option:
    """One setting as the outside world sees it: its key and its three spellings."""

    section: str
    name: str
    default: Any
    type: str
    unit: str
    why: str
    least: float | None
    most: float | None
    secret: bool

    @property
    def key(self) -> str:
        return self.name if self.section == "node" else f"{self.section}.{self.name}"

    @property
    def variable(self) -> str:
        return "ANNULUS_" + self.key.replace(".", "_").upper()

    @property
    def flag(self) -> str:
        return "--" + self.key.replace(".", "-").replace("_", "-")

    def show(self, value: Any) -> str:
        """Return the value as a person would write it; a secret only says that it is there."""
        if self.secret:
            return "********" if value else ""
        if value is None:
            return ""
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple) and not isinstance(value, Address):
            return ",".join(map(str, value))
        if self.unit == "bytes":
            return _show_bytes(value)
        return f"{value:g}" if isinstance(value, float) else str(value)


SECTIONS: Mapping[str, type[Any]] = {
    "node": NodeSettings,
    "cluster": ClusterSettings,
    "storage": StorageSettings,
    "compaction": CompactionSettings,
    "healing": HealingSettings,
    "index": IndexSettings,
    "workers": WorkerSettings,
    "admission": AdmissionSettings,
    "api": ApiSettings,
    "imports": ImportSettings,
    "auth": AuthSettings,
    "log": LogSettings,
}

OPTIONS: tuple[Option, ...] = tuple(
    Option(section=section, name=each.name, default=each.default, type=str(each.type), **each.metadata)
    for section, settings_type in SECTIONS.items()
    for each in fields(settings_type)
)


def _show_bytes(count: int) -> str:
    for size, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


# --- what must hold between values -------------------------------------------------------------------------------


def _out_of_bounds(settings: Settings) -> Iterator[Problem]:
    for option in OPTIONS:
        value = getattr(getattr(settings, option.section), option.name)
        if isinstance(value, (int, float)) and (text := bounds_text(option, value)):
            yield Problem(option.key, f"{option.show(value)} {text}", _source(settings, option.key), (option.key,))


def bounds_text(option: Option, value: float) -> str:
    if option.least is not None and value < option.least:
        return f"is below the least allowed, {option.show(option.least)}"
    if option.most is not None and value > option.most:
        return f"is above the most allowed, {option.show(option.most)}"
    return ""


def _broken_relations(settings: Settings) -> Iterator[Problem]:
    """Yield a problem for each rule between settings that does not hold."""
    storage = settings.storage

    def problem(key: str, text: str, *others: str) -> Problem:
        involved = (key, *others)
        return Problem(key, text, "; ".join(_source(settings, each) for each in involved), involved)

    if storage.growing_bytes_max < storage.segment_bytes_max:
        yield problem(
            "storage.growing_bytes_max",
            "must not be below storage.segment_bytes_max, else no segment ever fills",
            "storage.segment_bytes_max",
        )
    if storage.journal_bytes_max < 2 * storage.journal_file_bytes_max:
        yield problem(
            "storage.journal_bytes_max",
            "must be at least twice storage.journal_file_bytes_max: only whole files are cut, and one is being written",
            "storage.journal_file_bytes_max",
        )
    admission = settings.admission
    for below, above in (("low", "slow"), ("slow", "high")):
        names = f"memory_{below}_ratio", f"memory_{above}_ratio"
        if getattr(admission, names[0]) >= getattr(admission, names[1]):
            yield problem(
                f"admission.{names[0]}",
                f"must be below admission.{names[1]}, else what is refused and what is taken would alternate",
                f"admission.{names[1]}",
            )
    if 0 < admission.memory_bytes_max < MEMORY_BYTES_MIN:
        yield problem(
            "admission.memory_bytes_max",
            f"is less than a node without rows needs: give at least {_show_bytes(MEMORY_BYTES_MIN)}, or 0",
        )
    api = settings.api
    files = ("tls_certificate_file", "tls_key_file", "tls_client_ca_file", "tls_ca_file")
    given = [f"api.{name}" for name in files if getattr(api, name)]
    for name in files[:2]:
        if given and not getattr(api, name):
            yield problem(f"api.{name}", "is missing: TLS for clients needs a certificate and its key", *given)
    yield from _broken_cluster(settings, problem)


def _broken_cluster(settings: Settings, problem: Callable[..., Problem]) -> Iterator[Problem]:
    """Yield a problem for each rule between the settings of a cluster that does not hold."""
    node, cluster = settings.node, settings.cluster
    if cluster.election_s_min <= 3 * cluster.heartbeat_s:
        yield problem(
            "cluster.election_s_min",
            "must be above three times cluster.heartbeat_s, else one late heartbeat costs a leader its place",
            "cluster.heartbeat_s",
        )
    if cluster.election_s_max <= cluster.election_s_min:
        yield problem("cluster.election_s_max", "must be above cluster.election_s_min", "cluster.election_s_min")
    if node.replaces and node.join is None:
        yield problem("replaces", "makes sense only together with join: `annulus node replace` is for later")
    if node.join is not None and node.peers:
        yield problem(
            "join", "and peers are both given: a node joins a cluster, or is one of those that form it", "peers"
        )
    yield from _broken_advertisement(node, problem)
    if node.is_clustered and not node.peers:
        yield from _broken_guest(settings, problem)
        return
    if not node.peers:
        for key, given in (
            ("cluster_secret", node.cluster_secret),
            ("cluster_secret_file", node.cluster_secret_file),
        ):
            if given:
                yield problem(key, "makes sense only together with peers or join; leave it out")
        if cluster.repair_from_peers:
            yield problem("cluster.repair_from_peers", "this node has no peers to take anything from; leave it out")
        if (node.replication_factor or 1) > 1:
            yield problem(
                "replication_factor", "one node can hold only one copy of each shard; leave it out, or name more peers"
            )
        return
    names = [peer.name for peer in node.peers]
    if node.name not in names:
        yield problem("name", f"{node.name} is not among the peers {', '.join(names)}; it must be one of them", "peers")
    owners: dict[Address, str] = {}
    for peer in node.peers:
        if peer.address.port == 0:
            yield problem("peers", f"{peer} has port 0, on which nobody can find it")
        elif peer.address in owners:
            yield problem("peers", f"{owners[peer.address]} and {peer.name} have the same address {peer.address}")
        owners.setdefault(peer.address, peer.name)
    if node.listen.port and node.listen == node.peer_address:
        yield problem(
            "listen", f"{node.listen} is the address for other nodes too; they need one of their own", "peers"
        )
    if node.replication_factor is not None and node.replication_factor > len(node.peers):
        yield problem(
            "replication_factor", f"{node.replication_factor} copies need as many nodes, and peers names {len(names)}",
            "peers",
        )  # fmt: skip
    yield from _broken_proof(settings, problem)


def _broken_guest(settings: Settings, problem: Callable[..., Problem]) -> Iterator[Problem]:
    """Yield a problem for each rule that does not hold for a node that joins a cluster, or did so before."""
    node = settings.node
    if node.peer_listen is None:
        yield problem("join", "needs peer_listen too, the address at which other nodes find this one", "peer_listen")
    elif not node.peer_advertise and (node.peer_listen.port == 0 or node.peer_listen.is_any):
        yield problem(
            "peer_listen",
            f"{node.peer_listen} is no address at which other nodes can find this one; give peer_advertise too",
        )
    if node.join is not None and node.join == node.listen:
        yield problem("join", f"{node.join} is this node's own address; give that of a node of the cluster", "listen")
    if node.listen.port and node.listen == node.peer_listen:
        yield problem(
            "listen", f"{node.listen} is the address for other nodes too; they need one of their own", "peer_listen"
        )
    if node.replication_factor is not None:
        yield problem("replication_factor", "is the cluster's, which has one already; leave it out", "join")
    yield from _broken_proof(settings, problem)


def _broken_advertisement(node: NodeSettings, problem: Callable[..., Problem]) -> Iterator[Problem]:
    """Yield a problem for each rule that does not hold for the address that a node tells of itself."""
    if node.peer_advertise is None:
        return
    if not node.is_clustered:
        yield problem("peer_advertise", "is told to other nodes, and this one is alone; leave it out", "peers", "join")
    if node.peer_advertise.port == 0 or node.peer_advertise.is_any:
        yield problem("peer_advertise", f"{node.peer_advertise} is no address at which other nodes can find this one")


def _broken_proof(settings: Settings, problem: Callable[..., Problem]) -> Iterator[Problem]:
    """Yield a problem for each thing that keeps nodes from proving themselves to each other."""
    node, cluster = settings.node, settings.cluster
    files = {
        f"cluster.{name}": getattr(cluster, name) for name in ("tls_certificate_file", "tls_key_file", "tls_ca_file")
    }
    if any(files.values()) and not all(files.values()):
        given = [key for key, path in files.items() if path]
        for key in (key for key, path in files.items() if not path):
            yield problem(key, "is missing: TLS between nodes needs certificate, key and CA", *given)
    if node.cluster_secret and len(node.cluster_secret) < SECRET_CHARS_MIN:
        yield problem(
            "cluster_secret", f"is shorter than {SECRET_CHARS_MIN} characters; `openssl rand -hex 32` makes a good one"
        )
    proves = node.cluster_secret or node.cluster_secret_file or all(files.values())
    addresses = [peer.address for peer in node.peers] + [one for one in (node.peer_listen,) if one is not None]
    if node.is_clustered and not proves and not all(one.is_local for one in addresses):
        yield problem(
            "peers" if node.peers else "peer_listen",
            "has addresses that other machines reach, where anybody may pose as a node without a secret or TLS; "
            "give each node the same cluster_secret_file",
        )


def _source(settings: Settings, key: str) -> str:
    return f"{key} from {settings.sources.get(key, 'default')}"
