"""What is read from Parquet is what was written, whatever arrow makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from node.bulk.parquet import ParquetFile, Texts

ROWS = 25
BATCH_ROWS = 7
NUMBERS = np.arange(-12, 13)


@pytest.mark.parametrize(
    "column",
    [
        pytest.param(pa.array(NUMBERS % 3 == 0), id="bool"),
        pytest.param(pa.array(NUMBERS, pa.int8()), id="int8"),
        pytest.param(pa.array(NUMBERS + 12, pa.uint16()), id="uint16"),
        pytest.param(pa.array(NUMBERS), id="int64"),
        pytest.param(pa.array(NUMBERS / 8, pa.float32()), id="float32"),
        pytest.param(pa.array((NUMBERS / 8).astype(np.float16)), id="float16"),
        pytest.param(pa.array([None if one < 0 else int(one) for one in NUMBERS]), id="numbers, some null"),
        pytest.param(pa.array([f"row {one}" for one in NUMBERS]).dictionary_encode(), id="dictionary of text"),
        pytest.param(pa.array([f"☃ {one}" * (one % 3) for one in NUMBERS]), id="text"),
        pytest.param(pa.array([None if one % 4 else f"row {one}" for one in NUMBERS], pa.large_string()), id="null"),
        pytest.param(pa.array([[one / 2, 1.0] for one in NUMBERS.tolist()]), id="lists of one width"),
        pytest.param(pa.array([[1] * (one + 12) for one in NUMBERS.tolist()]), id="lists of several widths"),
        pytest.param(
            pa.FixedSizeListArray.from_arrays(pa.array(np.arange(3.0 * ROWS, dtype=np.float32)), 3), id="fixed lists"
        ),
    ],
)
@pytest.mark.parametrize("first", [0, BATCH_ROWS, 3 * BATCH_ROWS])
def test_batches_have_the_values_of_the_file(tmp_path: Path, column: Any, first: int) -> None:
    """Batches from any place on, across row groups, hold the values in order."""
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"column": column}), path, row_group_size=10)
    found: list[Any] = []
    for at, rows, columns in ParquetFile(path).batches(BATCH_ROWS, first):
        values = columns["column"]
        assert (at, len(values)) == (first + len(found), rows)
        found += values.tolist() if isinstance(values, np.ndarray) else values
        if isinstance(values, Texts):
            ends = np.cumsum(values.lengths)
            made = [values.data[a:b].decode() for a, b in zip(ends - values.lengths, ends, strict=True)]
            live = np.ones(rows, np.bool_) if values.valid is None else values.valid
            assert [one if here else None for one, here in zip(made, live, strict=True)] == list(values)
    assert found == column.to_pylist()[first:]
