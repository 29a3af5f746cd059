"""The collections under test, and what the rows in them hold: every value a function of key and version."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Key: TypeAlias = int
"""Names a row in every collection, whatever its primary key."""
Version: TypeAlias = int
"""Names one writing of a row; never used twice in a run."""

DIM = 8
TEXTS = ("", "plain", "grüße", "日本語", "tab\tand\nnewline", 'quote " and \\', "🙂" * 3, "x" * 180)


@dataclass(frozen=True)
class Subject:
    """A collection under test."""

    name: str
    shards: int
    index_types: Sequence[str]
    """Taken in turn whenever the index is rebuilt."""
    metric: str = "L2"
    text_keys: bool = False
    auto_id: bool = False
    """Then the primary key is the node's and `key` an ordinary field; rows are inserted and deleted, never upserted."""

    def literal(self, key: Key) -> int | str:
        """Return the key as the `key` field holds it."""
        return f"k{key:09d}" if self.text_keys else key

    def key_of(self, literal: Any) -> Key:
        """Return the key that a `key` field holds."""
        return int(str(literal)[1:]) if self.text_keys else int(literal)

    def filter_of(self, keys: Sequence[Key]) -> str:
        """Return the filter that lets exactly these keys through."""
        listed = ", ".join(f'"{self.literal(key)}"' if self.text_keys else str(key) for key in keys)
        return f"key in [{listed}]"

    def filter_all(self) -> str:
        """Return a filter that lets every row through."""
        return 'key >= ""' if self.text_keys else "key >= 0"

    def index(self, index_type: str) -> dict[str, Any]:
        """Return the index as the API takes it."""
        graph = {"M": 8, "efConstruction": 64} if index_type.startswith("HNSW") else {}
        params = graph or ({"nlist": 4} if index_type.startswith("IVF") else {})
        return {
            "fieldName": "vector",
            "indexName": "vector",
            "indexType": index_type,
            "metricType": self.metric,
            "params": params,
        }

    def schema(self) -> dict[str, Any]:
        """Return the schema as the API takes it: every kind of column, nulls, a default, dynamic keys."""
        text_key = {"elementTypeParams": {"max_length": 32}} if self.text_keys else {}
        fields: list[dict[str, Any]] = [
            {"fieldName": "key", "dataType": "VarChar" if self.text_keys else "Int64", **text_key},
            {"fieldName": "version", "dataType": "Int64"},
            {"fieldName": "vector", "dataType": "FloatVector", "elementTypeParams": {"dim": DIM}},
            {"fieldName": "text", "dataType": "VarChar", "elementTypeParams": {"max_length": 1024}},
            {"fieldName": "number", "dataType": "Double"},
            {"fieldName": "small", "dataType": "Int16"},
            {"fieldName": "flag", "dataType": "Bool"},
            {"fieldName": "document", "dataType": "JSON"},
            {"fieldName": "list", "dataType": "Array", "elementDataType": "Int64",
             "elementTypeParams": {"max_capacity": 8}},
            {"fieldName": "maybe", "dataType": "Int64", "nullable": True},
        ]  # fmt: skip
        if self.auto_id:
            fields.insert(0, {"fieldName": "id", "dataType": "Int64", "isPrimary": True})
        else:
            fields[0]["isPrimary"] = True
        return {"autoID": self.auto_id, "enableDynamicField": True, "fields": fields}


SUBJECTS: Sequence[Subject] = (
    Subject("crash_one", shards=1, index_types=("HNSW", "AUTOINDEX", "IVF_FLAT")),
    Subject("crash_two", shards=2, index_types=("AUTOINDEX", "HNSW", "HNSW_SQ")),
    Subject("crash_text", shards=2, index_types=("AUTOINDEX", "FLAT"), text_keys=True),
    Subject("crash_auto", shards=1, index_types=("AUTOINDEX", "HNSW"), auto_id=True),
)


def row(subject: Subject, key: Key, version: Version) -> dict[str, Any]:
    """Return the row as the API takes it and gives it back (but for an automatic primary key)."""
    chance = random.Random(f"{subject.name}/{key}/{version}")
    return {
        "key": subject.literal(key),
        "version": version,
        "vector": vector(subject, key, version),
        "text": chance.choice(TEXTS) + str(chance.randrange(1000)),
        "number": chance.uniform(-1e9, 1e9),
        "small": chance.randrange(-32768, 32768),
        "flag": chance.random() < 0.5,
        "document": {"a": chance.randrange(10**12), "b": [1, {"c": None}], "d": chance.choice(TEXTS)},
        "list": [chance.randrange(-(2**63), 2**63) for _ in range(chance.randrange(5))],
        "maybe": None if chance.random() < 0.3 else chance.randrange(2**53, 2**62),
        "extra": {"dynamic": chance.randrange(100)},
    }


def vector(subject: Subject, key: Key, version: Version) -> list[float]:
    """Return the row's vector: float32 values, no two rows alike."""
    seed = [int.from_bytes(subject.name.encode()[-4:], "little"), key, version]
    return [float(x) for x in np.random.default_rng(seed).standard_normal(DIM, dtype=np.float32)]


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return the fields that are not exactly as written, with both values."""
    names = [name for name in expected if not _same(expected[name], found.get(name, _MISSING))]
    return [f"{name}: {found.get(name, 'missing')!r}, written {expected[name]!r}" for name in names]


_MISSING = object()


def _same(expected: Any, found: Any) -> bool:
    if isinstance(expected, list) and expected and isinstance(expected[0], float):
        return isinstance(found, list) and np.array_equal(
            np.array(expected, dtype=np.float32), np.array(found, dtype=np.float32)
        )
    return type(expected) is type(found) and bool(expected == found)
