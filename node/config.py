"""Where the values of the settings come from, and how they are shown.

`load` reads four places, later ones winning: default < TOML file < environment < flag. A setting has one key and three
spellings:

    key (TOML: [storage] segment_bytes_max)     storage.segment_bytes_max
    environment                                 ANNULUS_STORAGE_SEGMENT_BYTES_MAX
    flag                                        --storage-segment-bytes-max

The settings of `NodeSettings` have no section: `data`, `ANNULUS_DATA`, `--data`. Sizes may be written `256MiB`, on/off
settings `true` or `false`, a duration is a number in the unit that ends its name. Files that settings name (secret,
certificates) are looked at here too, so that everything that is wrong is said at once.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from node.asking import VARIABLES
from node.settings import (
    GIB,
    KIB,
    MIB,
    OPTIONS,
    SECTIONS,
    Address,
    AdmissionSettings,
    ApiSettings,
    ClusterSettings,
    CompactionSettings,
    HealingSettings,
    IndexSettings,
    LogFormat,
    LogLevel,
    LogSettings,
    NodeSettings,
    Option,
    Peer,
    Problem,
    Settings,
    SettingsError,
    StorageSettings,
    WorkerSettings,
    bounds_text,
    parse_address,
)

__all__ = [
    "load",
    "describe",
    "config_flags",
    "from_flags",
    "Settings",
    "SettingsError",
    "Problem",
    "NodeSettings",
    "ClusterSettings",
    "StorageSettings",
    "CompactionSettings",
    "HealingSettings",
    "IndexSettings",
    "WorkerSettings",
    "AdmissionSettings",
    "ApiSettings",
    "LogSettings",
    "LogLevel",
    "LogFormat",
    "Address",
    "Peer",
    "Option",
    "OPTIONS",
    "Row",
]

ENVIRONMENT_PREFIX = "ANNULUS_"
CONFIG_VARIABLE = "ANNULUS_CONFIG"
"""Names the TOML file when no --config flag does."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
NAME_RULE = "use letters, digits, '_', '.' and '-', at most 63, a letter or digit first"
SECRETS_IN_FILES = {"cluster_secret_file": "cluster_secret", "auth.root_password_file": "auth.root_password"}
PRIVATE_FILES = (*SECRETS_IN_FILES, "cluster.tls_key_file", "api.tls_key_file")
FILES = (
    *PRIVATE_FILES,
    "cluster.tls_certificate_file",
    "cluster.tls_ca_file",
    "api.tls_certificate_file",
    "api.tls_client_ca_file",
    "api.tls_ca_file",
)
SECRET_BYTES_MAX = 4 << 10

S = TypeVar("S")


@dataclass(frozen=True)
class Row:
    """One line of `annulus config`."""

    key: str
    value: str
    unit: str
    source: str
    description: str


def describe(settings: Settings) -> list[Row]:
    """Return every setting with its value, unit, source and reason; secrets are hidden."""
    return [
        Row(
            key=option.key,
            value=option.show(getattr(getattr(settings, option.section), option.name)),
            unit=option.unit,
            source=settings.sources.get(option.key, "default"),
            description=option.why,
        )
        for option in OPTIONS
    ]


def load(*, flags: Mapping[str, Any], environment: Mapping[str, str], config_file: str | None = None) -> Settings:
    """Return the settings from all four places, the later ones winning.

    flags        key -> text or value; a value of None means "not given"
    environment  usually os.environ; only ANNULUS_* is looked at
    config_file  path of a TOML file; else the one ANNULUS_CONFIG names; else none

    Raises SettingsError with every problem found anywhere.
    """
    problems: list[Problem] = []
    warnings: list[str] = []
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    config_file = config_file or environment.get(CONFIG_VARIABLE) or None
    layers = [
        _from_file(config_file, problems) if config_file else [],
        _from_environment(environment, warnings),
        [(key, value, f"flag {_option(key).flag}") for key, value in flags.items() if value is not None],
    ]
    for layer in layers:
        for key, raw, source in layer:
            option = _option(key)
            try:
                values[key] = _parse(option, raw)
                sources[key] = source
            except ValueError as error:
                shown = "" if option.secret else f"{_show_raw(raw)} "
                problems.append(Problem(key, f"{shown}{error}", f"from {source}"))
    for named, secret in SECRETS_IN_FILES.items():
        problems += _from_secret_file(values, sources, named, secret)
    problems += _unreadable(values, sources)
    sections = {
        section: settings_type(
            **{
                option.name: values[option.key]
                for option in OPTIONS
                if option.section == section and option.key in values
            }
        )
        for section, settings_type in SECTIONS.items()
    }
    if sections["node"].copies == 2:
        warnings.append("two copies of each shard bear no loss: writes need both; replication_factor 3 bears one")
    try:
        settings = Settings(**sections, sources=sources, warnings=tuple(warnings))
    except SettingsError as error:
        # A relation with a value that did not even parse would be judged by its default: leave it for the next time.
        unparsed = {problem.key for problem in problems}
        problems += [problem for problem in error.problems if not unparsed & set(problem.involved)]
        if not problems:
            raise
    if problems:
        raise SettingsError(problems)
    return settings


def config_flags(command: Callable[..., S]) -> Callable[..., S]:
    """Decorate a click command with one flag per setting plus --config; they arrive as keywords (see `from_flags`)."""
    import click

    for option in reversed(OPTIONS):
        default = option.show(option.default)
        shown = f"{option.why} [{', '.join(filter(None, [option.unit, f'default {default}' if default else '']))}]"
        decorate = click.option(option.flag, _keyword(option.key), metavar=_metavar(option), help=shown, default=None)
        command = decorate(command)
    return click.option("--config", "config_file", metavar="FILE", help="TOML file with settings", default=None)(
        command
    )


def from_flags(keywords: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """Return the settings for the keywords that `config_flags` gave a command."""
    flags = {option.key: keywords.get(_keyword(option.key)) for option in OPTIONS}
    return load(flags=flags, environment=environment, config_file=keywords.get("config_file"))


# --- one value ---------------------------------------------------------------------------------------------------


def _parse(option: Option, raw: Any) -> Any:
    """Return the value of a setting given as text (environment, flag) or as a TOML value; ValueError says what fits."""
    value = PARSERS[option.type](raw, option)
    if isinstance(value, (int, float)) and (text := bounds_text(option, value)):
        raise ValueError(text)
    return value


def _parse_text(raw: Any, option: Option) -> str:
    if not isinstance(raw, str):
        raise ValueError("is not text")
    if option.key == "name" and not NAME.fullmatch(raw):
        raise ValueError(f"is not a name; {NAME_RULE}")
    if option.key == "data" and not raw.strip():
        raise ValueError("is not a path")
    return raw


def _parse_int(raw: Any, option: Option) -> int:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if isinstance(raw, str):
        if option.unit == "bytes":
            return _parse_bytes(raw)
        if re.fullmatch(r"[+-]?[0-9][0-9_]{0,18}", raw.strip()):
            return int(raw)
    raise ValueError("is not a size; write bytes, or a number with KiB, MiB or GiB" if option.unit == "bytes"
                     else "is not a whole number")  # fmt: skip


def _parse_float(raw: Any, option: Option) -> float:
    if isinstance(raw, (int, float, str)) and not isinstance(raw, bool):
        try:
            value = float(raw)
        except ValueError:
            value = float("nan")
        if abs(value) < float("inf"):
            return value
    raise ValueError("is not a number" + (f" of {option.unit}" if option.unit in ("s", "ms") else ""))


def _parse_bool(raw: Any, option: Option) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.strip().lower() in ("true", "false"):
        return raw.strip().lower() == "true"
    raise ValueError("is neither true nor false")


def _parse_address(raw: Any, option: Option) -> Address:
    return parse_address(raw if isinstance(raw, str) else "")


def _parse_peers(raw: Any, option: Option) -> tuple[Peer, ...]:
    if isinstance(raw, Mapping):
        pairs = [(str(name), address) for name, address in raw.items()]
    elif isinstance(raw, str):
        pairs = [
            (name.strip(), address) for name, _, address in (each.partition("=") for each in raw.split(",") if each)
        ]
    else:
        raise ValueError("is not a list of peers; write n1=HOST:PORT,n2=HOST:PORT")
    peers = []
    for name, address in pairs:
        try:
            peers.append(Peer(name, _parse_address(address, option)))
        except ValueError as error:
            raise ValueError(f"is not a list of peers; {name}={address} {error}") from None
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("names a peer twice")
    for name, _ in pairs:
        if not NAME.fullmatch(name):
            raise ValueError(f"has a peer with the name {name!r}; {NAME_RULE}")
    return tuple(peers)


def _parse_choice(kind: type[StrEnum]) -> Callable[[Any, Option], StrEnum]:
    def parse(raw: Any, option: Option) -> StrEnum:
        try:
            return kind(str(raw).strip().lower())
        except ValueError:
            raise ValueError(f"is not one of {', '.join(kind)}") from None

    return parse


PARSERS: Mapping[str, Callable[[Any, Option], Any]] = {
    "str": _parse_text,
    "int": _parse_int,
    "int | None": _parse_int,
    "float": _parse_float,
    "bool": _parse_bool,
    "Address": _parse_address,
    "Address | None": _parse_address,
    "tuple[Peer, ...]": _parse_peers,
    "LogLevel": _parse_choice(LogLevel),
    "LogFormat": _parse_choice(LogFormat),
}


def _parse_bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9][0-9_]{0,18})\s*(B|KiB|MiB|GiB)?", text.strip())
    if not found:
        raise ValueError("is not a size; write bytes, or a number with KiB, MiB or GiB")
    return int(found[1]) * {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}[found[2] or "B"]


def _show_raw(raw: Any) -> str:
    shown = repr(raw) if isinstance(raw, str) else str(raw)
    return shown if len(shown) <= 80 else shown[:77] + "..."


# --- where values come from --------------------------------------------------------------------------------------


def _from_file(path: str, problems: list[Problem]) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, raw value, source) of a TOML file; what is wrong with the file itself becomes a problem."""
    source = f"file {path}"
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        problems.append(Problem("config", f"cannot read the file: {error.strerror}", source))
        return
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(Problem("config", f"is not TOML: {error}", source))
        return
    keys = {option.key for option in OPTIONS}
    for name, value in document.items():
        section = name in SECTIONS and name != "node" and isinstance(value, dict)
        for key, raw in ((f"{name}.{inner}", each) for inner, each in value.items()) if section else [(name, value)]:
            if key in keys:
                yield key, raw, source
            else:
                problems.append(Problem(key, f"is not a setting{_suggest(key, keys)}", f"from {source}"))


def _from_environment(environment: Mapping[str, str], warnings: list[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, raw value, source) of ANNULUS_* variables.

    A variable that is no setting is only warned of: Kubernetes puts ANNULUS_PORT and the like into every container
    beside a service named annulus.
    """
    by_variable = {option.variable: option for option in OPTIONS}
    for variable in sorted(environment):
        if variable in by_variable:
            yield by_variable[variable].key, environment[variable], f"environment {variable}"
        elif variable.startswith(ENVIRONMENT_PREFIX) and variable not in (CONFIG_VARIABLE, *VARIABLES):
            warnings.append(f"environment variable {variable} is not a setting{_suggest(variable, set(by_variable))}")


def _from_secret_file(values: dict[str, Any], sources: dict[str, str], named: str, secret: str) -> Iterator[Problem]:
    """Put the secret in the file that the setting `named` names where one given directly would be."""
    path = values.get(named)
    if not path:
        return
    source = f"from {sources[named]}"
    if values.get(secret):
        yield Problem(named, f"and {secret} are both given; leave one of them out", source)
        return
    try:
        with open(path, "rb") as file:
            text = file.read(SECRET_BYTES_MAX + 1).decode().strip()
    except OSError:
        return  # told by `_unreadable`
    except UnicodeDecodeError:
        text = ""
    if not text or len(text) > SECRET_BYTES_MAX:
        yield Problem(named, f"{path} holds no secret: a line of text was expected", source)
    else:
        values[secret], sources[secret] = text, f"file {path}"


def _unreadable(values: Mapping[str, Any], sources: Mapping[str, str]) -> Iterator[Problem]:
    """Yield a problem for each named file that cannot be read, or that others can read though it is private."""
    for key in FILES:
        if path := values.get(key):
            source = f"from {sources[key]}"
            try:
                with open(path, "rb") as file:
                    mode = os.fstat(file.fileno()).st_mode
                    file.peek(1)
            except OSError as error:
                yield Problem(key, f"cannot read the file {path}: {error.strerror}", source)
                continue
            if key in PRIVATE_FILES and mode & 0o077:
                yield Problem(key, f"{path} may be read by others than its owner; chmod 600 it", source)


def _suggest(word: str, known: set[str]) -> str:
    # The prefix that all variables share would make any two of them look alike.
    bare = {each.removeprefix(ENVIRONMENT_PREFIX): each for each in sorted(known)}
    close = difflib.get_close_matches(word.removeprefix(ENVIRONMENT_PREFIX), bare, n=1, cutoff=0.75)
    return f"; did you mean {bare[close[0]]}?" if close else ""


def _option(key: str) -> Option:
    return _BY_KEY[key]


_BY_KEY: Mapping[str, Option] = {option.key: option for option in OPTIONS}


def _keyword(key: str) -> str:
    return key.replace(".", "_")


def _metavar(option: Option) -> str:
    if option.unit == "path":
        return "DIR" if option.key == "data" else "FILE"
    return {"bool": "BOOL", "LogLevel": "LEVEL", "LogFormat": "FORMAT"}.get(option.type) or (
        re.sub(r"[^A-Z:=,.]", "", option.unit.upper()) or "TEXT"
    )
