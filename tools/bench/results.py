"""What a run has found: rows of named numbers, looked up by scenario and name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One line of a scenario's table."""

    scenario: str
    name: str
    values: Mapping[str, float]
    """Column -> number; the column says the unit."""


@dataclass
class Results:
    """All rows of a run, in the order in which they were measured."""

    rows: list[Row] = field(default_factory=list)

    def add(self, scenario: str, name: str, **values: float) -> Row:
        """Append a row; `_` in a column's name reads as a blank, `per_s` as `/s`, `recall` as `recall@10`."""
        row = Row(scenario, name, {column_name(key): value for key, value in values.items()})
        self.rows.append(row)
        return row

    def repeat(self, row: Row, name: str, **more: float) -> Row:
        """Append a row again under another name, with more columns."""
        again = Row(row.scenario, name, {**row.values, **{column_name(key): value for key, value in more.items()}})
        self.rows.append(again)
        return again

    def get(self, scenario: str, name: str, column: str) -> float | None:
        """Return a number, None if it was not measured."""
        for row in self.rows:
            if row.scenario == scenario and row.name == name:
                value = row.values.get(column)
                return None if value is None or math.isnan(value) else value
        return None

    def scenarios(self) -> dict[str, list[Row]]:
        """Return the rows by scenario, both in order of appearance."""
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.scenario, []).append(row)
        return grouped


def column_name(key: str) -> str:
    """Return a keyword as a column's heading."""
    heading = {"per_s": "queries/s", "rows_per_s": "rows/s", "recall": "recall@10"}
    return heading.get(key, key.replace("_", " "))
