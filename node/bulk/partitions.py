"""Partitions of rows in files and copies: the column that names each row's, and making those that are missing.

`$partition` can be the name of no field. Where it is absent, or a row has nothing there, the row goes to the default
partition; a collection with a partition key ignores it, because its rows find theirs by themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from node.bulk.remote import Remote
from node.bulk.sources import Chunk

PARTITION_NAME: Final = "$partition"
PARTITIONS: Final = "partitions"
"""The key under which the request that makes a collection again names its partitions; the API ignores it."""


def named_partitions(names: Sequence[str], *, keyed: bool) -> list[str]:
    """Return the partitions among which a collection's rows are told apart: none if there is but one, or a key."""
    return [] if keyed or len(names) < 2 else sorted(names)


def by_partition(chunk: Chunk, *, wanted: str = "", keyed: bool = False) -> list[tuple[str, Chunk]]:
    """Return the chunk's rows by the partition that each names, "" for the default one, first as they come.

    wanted  the partition of all rows, whatever they name
    keyed   whether the collection has a partition key, so that nothing is named

    What is bad in the chunk, and rows that name no partition, are in the first part, which is there always.
    """
    if PARTITION_NAME not in chunk.columns:
        return [("" if keyed else wanted, chunk)]
    columns = {name: values for name, values in chunk.columns.items() if name != PARTITION_NAME}
    if wanted or keyed:
        whole = Chunk(chunk.first, chunk.count, columns, chunk.rows, chunk.bad, chunk.is_text, chunk.is_json)
        return [("" if keyed else wanted, whole)]
    bad = dict(chunk.bad)
    places: dict[str, list[int]] = {}
    for i, name in enumerate(chunk.columns[PARTITION_NAME]):
        if isinstance(name, str) or name is None:
            places.setdefault(name or "", []).append(i)
        else:
            bad[chunk.rows[i]] = f"field {PARTITION_NAME!r}: the name of a partition is text"
    parts = [
        (
            name,
            Chunk(
                chunk.first,
                len(chosen),
                {field: _chosen(values, chosen) for field, values in columns.items()},
                [chunk.rows[i] for i in chosen],
                {},
                chunk.is_text,
                chunk.is_json,
            ),
        )
        for name, chosen in (places or {"": []}).items()
    ]
    parts[0][1].bad = bad
    return parts


def _chosen(values: Any, chosen: Sequence[int]) -> Any:
    return values[chosen] if isinstance(values, np.ndarray) else [values[i] for i in chosen]


class Partitions:
    """Those of one collection, made when rows of them come. Any thread may ask."""

    def __init__(self, remote: Remote, collection: str) -> None:
        self._remote = remote
        self._asked = {"collectionName": collection}
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def ensure(self, name: str) -> None:
        """Return when the partition is there. Raises Refused or Unreachable."""
        with self._lock:
            if not self._known:
                self._known.update(self._remote.call("/partitions/list", self._asked))
            if name not in self._known:
                self._remote.call("/partitions/create", {**self._asked, "partitionName": name})
                self._known.add(name)
