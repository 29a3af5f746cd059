"""The dumb model of a shard's rows: a list, and a scan for every question. Slow, and plainly right."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from index.metric import Metric
from storage.types import TICK_MAX

Key = int | str


@dataclass
class ModelRow:
    key: Key
    values: dict[str, object]
    vector: tuple[float, ...]
    inserted: int
    deleted: int = TICK_MAX

    def lives_at(self, tick: int, expire_before: int = 0) -> bool:
        return expire_before <= self.inserted <= tick < self.deleted


@dataclass
class ModelRows:
    """Rows in the order in which they were inserted."""

    rows: list[ModelRow] = field(default_factory=list)

    def insert(self, key: Key, values: dict[str, object], vector: tuple[float, ...], tick: int) -> None:
        self.rows.append(ModelRow(key, values, vector, tick))

    def delete(self, keys: set[Key], tick: int) -> int:
        """Kill the live rows with these keys that were inserted before the tick; return how many died."""
        dying = [r for r in self.rows if r.key in keys and r.deleted == TICK_MAX and r.inserted < tick]
        for row in dying:
            row.deleted = tick
        return len(dying)

    def live(self, tick: int, expire_before: int = 0) -> list[ModelRow]:
        return [row for row in self.rows if row.lives_at(tick, expire_before)]

    def keys(self, rows: list[ModelRow]) -> list[Key]:
        """Return the keys of rows, each once, ascending."""
        return sorted({row.key for row in rows})


def model_distance(query: tuple[float, ...], vector: tuple[float, ...], metric: Metric) -> float:
    """Return the distance of two vectors from its definition, in float64; smaller is nearer."""
    q, v = np.array(query, np.float64), np.array(vector, np.float64)
    if metric is Metric.L2:
        return float(((q - v) ** 2).sum())
    if metric is Metric.COSINE:
        lengths = float(np.sqrt((q * q).sum()) * np.sqrt((v * v).sum()))
        return -float(q @ v) / lengths if lengths else 0.0
    return -float(q @ v)


def nearest_keys(
    rows: list[ModelRow], query: tuple[float, ...], metric: Metric, *, low: float = -np.inf, high: float = np.inf
) -> dict[Key, float]:
    """Return the distance of the nearest row of each key, of those with low <= distance < high."""
    best: dict[Key, float] = {}
    for row in rows:
        distance = model_distance(query, row.vector, metric)
        if low <= distance < high:
            best[row.key] = min(distance, best.get(row.key, np.inf))
    return best
