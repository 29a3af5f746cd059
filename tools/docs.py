"""python -m tools.docs: the README's tables that the code knows better, made from it. --write puts them in.

A block stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`. Without --write the exit status is 1 if
any block is not what the code says; the README's test holds the same.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from cluster.catalog import COLLECTIONS_MAX, DATABASES_MAX, PARTITIONS_MAX
from index.metric import METRICS
from index.protocol import Form
from index.spec import IndexSpec, IndexType, parse_index_spec
from index.spec import index_types as index_types_of
from node.api.entities import WINDOW_MAX
from node.api.exact import DEPTH_MAX as JSON_DEPTH_MAX
from node.api.faults import FAULTS
from node.api.values import JSON_BYTES_MAX
from node.edge import TIMEOUT_S_MAX
from node.metrics import Metrics
from node.settings import OPTIONS
from storage.errors import AnnulusError, BadRequest, Unavailable
from storage.filter.parser import TEXT_CHARS_MAX, TOKENS_MAX
from storage.filter.patterns import PATTERN_CHARS_MAX
from storage.filter.syntax import DEPTH_MAX as FILTER_DEPTH_MAX
from storage.schema import (
    ARRAY_CAPACITY_MAX,
    DIM_MAX,
    DIM_MIN,
    FIELDS_MAX,
    NAME_CHARS_MAX,
    SHARDS_MAX,
    VARCHAR_BYTES_MAX,
    VECTOR_FIELDS_MAX,
    DataType,
)
from tools.compatibility import declared, rows

README: Final = Path(__file__).resolve().parent.parent / "README.md"
_BLOCK: Final = re.compile(
    r"(?P<head><!-- generated: (?P<name>[a-z_]+) -->\n).*?(?P<tail><!-- end of (?P=name) -->)", re.S
)
_ABSTRACT: Final = (AnnulusError, BadRequest, Unavailable)
"""Roots of the error tree."""


def refreshed(text: str) -> str:
    """Return the text with every block as the code says now. Raises KeyError for a block that nobody makes."""
    return _BLOCK.sub(lambda found: found["head"] + BLOCKS[found["name"]]() + found["tail"], text)


def names(text: str) -> list[str]:
    """Return the names of the blocks in the text."""
    return [found["name"] for found in _BLOCK.finditer(text)]


# --- one block each ----------------------------------------------------------------------------------------------


def settings() -> str:
    return table(
        ("setting", "default", "unit", "what it does"),
        ((f"`{one.key}`", _code(one.show(one.default)), one.unit, one.why) for one in OPTIONS),
    )


def compatible() -> str:
    return table(("how", "REST, `/v2/vectordb` +", "gRPC"), rows(declared()))


def codes() -> str:
    by_code: dict[int, list[type[AnnulusError]]] = {}
    for kind, fault in FAULTS.items():
        if kind not in _ABSTRACT:
            by_code.setdefault(fault.code, []).append(kind)
    rows = []
    for code, kinds in sorted(by_code.items()):
        words = ", ".join(dict.fromkeys(kind.code.replace("_", " ") for kind in kinds))
        always = any(FAULTS[kind].always_status for kind in kinds)
        statuses = "/".join(dict.fromkeys(str(FAULTS[kind].status) for kind in kinds))
        again = "yes" if all(kind.retriable for kind in kinds) else "no"
        rows.append((str(code), words, statuses + (" always" if always else ""), again))
    return table(("code", "meaning", "own HTTP status", "may succeed later"), rows)


def limits() -> str:
    rows = (
        ("names of databases, collections, fields, indexes, partitions, aliases", f"{NAME_CHARS_MAX} characters"),
        ("databases", f"{DATABASES_MAX}"),
        ("collections", f"{COLLECTIONS_MAX:,}"),
        ("partitions of a collection", f"{PARTITIONS_MAX:,}"),
        ("virtual channels of a collection (`shardsNum`)", f"{SHARDS_MAX}"),
        ("fields of a collection", f"{FIELDS_MAX}, {VECTOR_FIELDS_MAX} of them vectors"),
        ("components of a vector", f"{DIM_MIN} to {DIM_MAX:,}"),
        ("a VarChar", f"{VARCHAR_BYTES_MAX:,} bytes"),
        ("elements of an Array", f"{ARRAY_CAPACITY_MAX:,}"),
        ("a JSON value, or the dynamic keys of a row", f"{JSON_BYTES_MAX:,} bytes"),
        ("nesting of a request or a JSON value", f"{JSON_DEPTH_MAX}"),
        ("`limit`, `limit` + `offset`, query vectors of a search", f"{WINDOW_MAX:,}"),
        ("text of a filter", f"{TEXT_CHARS_MAX:,} characters, {TOKENS_MAX:,} tokens, nesting {FILTER_DEPTH_MAX}"),
        ("pattern of `like`, `=~`, `!~`", f"{PATTERN_CHARS_MAX:,} characters"),
        ("`Request-Timeout`", f"{TIMEOUT_S_MAX:,.0f} s"),
    )
    return table(("what", "at most"), rows)


def index_types() -> str:
    rows = []
    for form in Form:
        for kind in index_types_of(form):
            spec = parse_index_spec(kind, None, {}, form=form)
            effort = "`ef`" if spec.is_graph else "`nprobe`" if "nlist" in spec.params else ""
            if kind is IndexType.AUTOINDEX and spec.is_graph:
                effort += ", `level`"
            metrics = ", ".join(f"`{metric}`" for metric in METRICS[form])
            rows.append((f"{form}", f"`{kind}`", metrics, str(spec.engine), _build_params(kind, spec), effort))
    return table(("vectors", "type", "metrics", "engine", "build parameters (default)", "per search"), rows)


def field_types() -> str:
    return textwrap.fill("Field types: " + ", ".join(f"`{kind}`" for kind in DataType) + ".", 120) + "\n"


def metrics() -> str:
    rows = []
    for family in Metrics().registry.collect():
        if family.name.startswith("annulus_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            rows.append((f"`{name}`", family.type, family.documentation))
    return table(("metric", "kind", "what"), rows)


def _build_params(kind: IndexType, spec: IndexSpec) -> str:
    values = ", ".join(f"`{name}` ({value})" for name, value in spec.params.items())
    return f"none; built with {values}" if kind is IndexType.AUTOINDEX and values else values


BLOCKS: Final[Mapping[str, Callable[[], str]]] = {
    "settings": settings,
    "compatibility": compatible,
    "codes": codes,
    "limits": limits,
    "index_types": index_types,
    "field_types": field_types,
    "metrics": metrics,
}


# --- tables ------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.docs", description="Make the README's generated tables.")
    parser.add_argument("--write", action="store_true", help="put them in; else only say whether they are current")
    chosen = parser.parse_args(arguments)
    old = README.read_text(encoding="utf-8")
    new = refreshed(old)
    if new == old:
        print("the README's tables are current")
        return 0
    if chosen.write:
        README.write_text(new, encoding="utf-8")
        print("the README's tables are rewritten")
        return 0
    print("the README's tables are not what the code says: run python -m tools.docs --write", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
