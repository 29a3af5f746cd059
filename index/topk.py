"""Merging partial answers: the best k of what several segments, or several nodes, found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from index.protocol import Distances, Offsets


class Merged(NamedTuple):
    """The best hits of all parts, nearest first, padded like `Hits`."""

    ids: Offsets
    """(q, k) as given in the parts, -1 where there is no further hit."""
    distances: Distances
    """(q, k), +inf where there is no further hit."""
    sources: npt.NDArray[np.int64]
    """(q, k) which part each hit came from, -1 where there is no further hit."""


def merge(parts: Sequence[tuple[Offsets, Distances]], k: int, *, queries: int | None = None) -> Merged:
    """Return the k nearest hits of all parts for each query.

    parts    (ids (q, k_i) int64, distances (q, k_i) float32), padded with -1 and +inf; k_i may differ
    queries  q, needed only if there may be no parts

    Ties go to the earlier part, within a part to the earlier hit: parts in the same order give the same answer on
    every node. An id in two parts appears twice; the caller knows whether that can be.
    Cost: a stable sort of q lines of sum(k_i).
    """
    if not parts:
        if queries is None:
            raise ValueError("no parts to merge, and the number of queries is unknown")
        nothing = np.empty((queries, 0), dtype=np.int64)
        return _padded(nothing, nothing.astype(np.float32), nothing, k)
    ids = np.concatenate([part_ids for part_ids, _ in parts], axis=1)
    distances = np.concatenate([part_distances for _, part_distances in parts], axis=1)
    widths = [part_ids.shape[1] for part_ids, _ in parts]
    sources = np.repeat(np.arange(len(parts), dtype=np.int64), widths)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    merged_ids = np.take_along_axis(ids, order, axis=1)
    merged_sources = sources[order]
    merged_sources[merged_ids < 0] = -1
    return _padded(merged_ids, np.take_along_axis(distances, order, axis=1), merged_sources, k)


def smallest(distances: Distances, k: int) -> Offsets:
    """Return the places of the k smallest distances, ascending; of equal ones the first places."""
    if len(distances) > k:
        edge = np.partition(distances, k - 1)[k - 1]
        nearer = np.flatnonzero(distances < edge)
        places = np.sort(np.concatenate([nearer, np.flatnonzero(distances == edge)[: k - len(nearer)]]))
        return places[np.argsort(distances[places], kind="stable")]
    return np.argsort(distances, kind="stable")


def _padded(ids: Offsets, distances: Distances, sources: npt.NDArray[np.int64], k: int) -> Merged:
    missing = k - ids.shape[1]
    if missing <= 0:
        return Merged(ids, distances, sources)
    pad = ((0, 0), (0, missing))
    return Merged(
        np.pad(ids, pad, constant_values=-1),
        np.pad(distances, pad, constant_values=np.inf),
        np.pad(sources, pad, constant_values=-1),
    )
