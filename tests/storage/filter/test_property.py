"""Random filters over random rows: the implementation agrees with a plain interpreter in every way it is used."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.columns import Batch, ScalarColumn, StringColumn
from storage.filter import CompiledFilter, FieldStats, compile_filter
from storage.types import FieldId
from tests.storage.filter.model import SCHEMA, Row, Tree, batch_of, holds, show

INTS = [-(2**63), -(2**53) - 1, -128, -2, -1, 0, 1, 2, 3, 7, 127, 2**53, 2**53 + 1, 2**63 - 1]
FLOATS = [-(2.0**63), -1.5, -0.0, 0.1, 0.5, 1.0, 2.0, 3.5, 2.0**53, 2.0**63, 1e19, 1e300]
SINGLES = [-1.5, 0.0, float(np.float32(0.1)), 0.5, 1.0, 2.0, 2.0**24, float(np.float32(3e38))]
TEXTS = ["", "a", "b", "ab", "aba", "a%b", "a_", "\\", "é", "a\nb", "\U0001f600", "z'\""]
PATTERNS = ["", "%", "a%", "%b", "%a%", "a_", "_", "a\\%b", "%\\_", "\\\\", "a%b", "_%_", "%é", "z'\"", "a__"]
REGEXES = ["a", "^a", "b$", "a.b", "^$", "[ab]+$", "a|é", "", "(ab?)+$"]
ORDERS = ["==", "!=", "<", "<=", ">", ">="]

ints, floats, texts = st.sampled_from(INTS), st.sampled_from(FLOATS), st.sampled_from(TEXTS)
atoms = st.one_of(st.booleans(), ints, floats, texts)
json_atoms = st.one_of(st.none(), atoms, st.sampled_from([2**63, 2**64 - 1]))
json_lists = st.lists(st.one_of(json_atoms, st.lists(json_atoms, max_size=2)), max_size=4)
documents = st.dictionaries(
    st.sampled_from("abc"), st.one_of(json_atoms, json_lists, st.fixed_dictionaries({"a": json_atoms})), max_size=3
)


def nullable(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


@st.composite
def rows_strategy(draw: st.DrawFn) -> list[Row]:
    row = st.fixed_dictionaries(
        {
            "small": nullable(st.sampled_from([-128, -2, -1, 0, 1, 2, 3, 7, 127])),
            "whole": nullable(ints),
            "ratio": nullable(st.sampled_from(SINGLES)),
            "amount": nullable(floats),
            "name": nullable(texts),
            "other": texts,
            "flag": nullable(st.booleans()),
            "doc": nullable(st.one_of(documents, json_lists, json_atoms.filter(lambda v: v is not None))),
            "words": nullable(st.lists(texts, max_size=3)),
            "nums": st.lists(st.sampled_from([-2, 0, 1, 2, 3]), max_size=3),
            "marks": st.lists(st.sampled_from(SINGLES), max_size=3),
            "$meta": documents,
        }
    )
    rows = draw(st.lists(row, max_size=8))
    ids = draw(st.lists(ints, min_size=len(rows), max_size=len(rows)))
    return [{"id": key, **row} for key, row in zip(ids, rows, strict=True)]


keys = st.lists(st.one_of(st.sampled_from("abc"), st.sampled_from([0, 1])), min_size=1, max_size=3)
paths = st.one_of(
    st.tuples(st.just("path"), st.just("doc"), keys),
    st.tuples(st.just("path"), st.just("$meta"), st.sampled_from("abc").map(lambda key: [key])),
    st.tuples(st.just("path"), st.sampled_from("abc"), st.one_of(st.just([]), keys)),
)
whole_values = st.one_of(
    st.sampled_from([("field", "id"), ("field", "small"), ("field", "whole")]),
    st.tuples(st.just("element"), st.just("nums"), st.integers(0, 3)),
    st.tuples(st.just("length"), st.one_of(st.sampled_from([("field", "words"), ("field", "nums")]), paths)),
)
float_values = st.one_of(
    st.sampled_from([("field", "ratio"), ("field", "amount")]),
    st.tuples(st.just("element"), st.just("marks"), st.integers(0, 3)),
)
text_values = st.one_of(
    st.sampled_from([("field", "name"), ("field", "other")]),
    st.tuples(st.just("element"), st.just("words"), st.integers(0, 3)),
)
numbers = st.one_of(ints, floats)


@st.composite
def arithmetic(draw: st.DrawFn) -> Tree:
    kind = draw(st.sampled_from(["whole", "float", "path"]))
    value: Tree = draw({"whole": whole_values, "float": float_values, "path": paths}[kind])
    for _ in range(draw(st.integers(1, 2))):
        ops = ["+", "-", "*", "/", "**"] + (["%", "&", "|", "^", "<<", ">>"] if kind != "float" else [])
        op = draw(st.sampled_from(ops))
        bits = op in ("%", "&", "|", "^")
        if op in ("<<", ">>"):
            constant: Any = draw(st.sampled_from([0, 1, 3, 63]))
        elif op == "**":
            constant = draw(st.sampled_from([0, 1, 2, 3] if kind != "float" else [2, 0.5, -1]))
        else:
            constant = draw(ints if bits or kind == "whole" else numbers)
        flipped = op not in ("**", "<<", ">>") and draw(st.booleans())
        if op in ("/", "%") and constant == 0 and not flipped:
            constant = 2
        value = ("arith", op, value, constant, flipped)
    return value


number_values = st.one_of(whole_values, float_values, arithmetic())


@st.composite
def comparisons(draw: st.DrawFn) -> Tree:
    value, constants = draw(
        st.one_of(
            st.tuples(number_values, st.just(numbers)),
            st.tuples(text_values, st.just(texts)),
            st.tuples(paths, st.just(st.one_of(numbers, texts))),
        )
    )
    if draw(st.integers(0, 4)) == 0:
        up = draw(st.booleans())
        op1, op2 = (draw(st.sampled_from(["<", "<="] if up else [">", ">="])) for _ in range(2))
        low = draw(constants)
        high = draw(texts if isinstance(low, str) else numbers)
        return ("range", low, op1, value, op2, high)
    return ("cmp", draw(st.sampled_from(ORDERS)), value, draw(constants), draw(st.booleans()))


truths = st.one_of(
    st.tuples(
        st.just("cmp"), st.sampled_from(["==", "!="]), st.one_of(st.just(("field", "flag")), paths), st.booleans(),
        st.booleans(),
    ),
    st.just(("bool", ("field", "flag"))),
)  # fmt: skip
literal_lists = st.lists(st.one_of(atoms, st.lists(atoms, max_size=2)), max_size=3)
list_equality = st.tuples(
    st.just("cmp"), st.sampled_from(["==", "!="]), paths, literal_lists, st.just(False)
)  # fmt: skip
field_pairs = st.one_of(
    st.tuples(st.just("fields"), st.sampled_from(ORDERS), number_values, number_values).filter(
        lambda tree: "path" not in repr(tree[2:])
    ),
    st.tuples(st.just("fields"), st.sampled_from(ORDERS), text_values, text_values),
)
memberships = st.one_of(
    st.tuples(st.just("in"), whole_values, st.lists(ints, max_size=7), st.booleans()),
    st.tuples(st.just("in"), float_values, st.lists(numbers, max_size=7), st.booleans()),
    st.tuples(st.just("in"), text_values, st.lists(texts, max_size=7), st.booleans()),
    st.tuples(st.just("in"), st.just(("field", "flag")), st.lists(st.booleans(), max_size=2), st.booleans()),
    st.tuples(
        st.just("in"), paths,
        st.one_of(st.lists(numbers, max_size=7), st.lists(texts, max_size=7), st.lists(st.booleans(), max_size=2)),
        st.booleans(),
    ),
)  # fmt: skip
textual = st.one_of(text_values, paths)
matches = st.one_of(
    st.tuples(st.just("like"), textual, st.sampled_from(PATTERNS)),
    st.tuples(st.just("regex"), textual, st.sampled_from(REGEXES), st.booleans()),
)
nulls = st.one_of(
    st.tuples(
        st.just("null"),
        st.one_of(paths, st.sampled_from([("field", n) for n in ("id", "small", "name", "flag", "doc", "words")])),
        st.booleans(),
    ),
    st.tuples(st.just("exists"), paths),
)


@st.composite
def containments(draw: st.DrawFn) -> Tree:
    target, constants = draw(
        st.one_of(
            st.tuples(st.just(("field", "words")), st.just(texts)),
            st.tuples(st.just(("field", "nums")), st.just(ints)),
            st.tuples(st.just(("field", "marks")), st.just(numbers)),
            st.tuples(paths, st.just(st.one_of(atoms, st.lists(atoms, max_size=2)))),
        )
    )
    mode = draw(st.sampled_from(["one", "all", "any"]))
    return (
        "contains",
        mode,
        target,
        draw(st.lists(constants, min_size=mode == "one", max_size=1 if mode == "one" else 3)),
    )


leaves = st.one_of(
    comparisons(), truths, list_equality, field_pairs, memberships, matches, nulls, containments()
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["and", "or"]), st.lists(inner, min_size=2, max_size=3)),
        st.tuples(st.just("not"), inner),
    ),
    max_leaves=6,
)


@settings(max_examples=250, deadline=None)
@given(trees, rows_strategy(), st.data())
def test_a_filter_keeps_the_rows_the_interpreter_keeps(tree: Tree, rows: list[Row], data: st.DataObject) -> None:
    """So do its canonical text, and evaluating at offsets; keys and pruning never lose a row."""
    compiled = compile_filter(show(tree), SCHEMA)
    batch = batch_of(rows)
    expected = [holds(tree, row) is True for row in rows]
    found = compiled.evaluate(batch)
    assert found.tolist() == expected, compiled.text

    assert compile_filter(compiled.text, SCHEMA).evaluate(batch).tolist() == expected
    offsets = np.array(
        data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9) if rows else st.just([])), np.int64
    )
    at_offsets = compiled.evaluate(batch, offsets)
    assert at_offsets.tolist() == found[offsets].tolist()
    assert compiled.evaluate(batch.take(offsets)).tolist() == at_offsets.tolist()
    assert compiled.evaluate(batch.select(sorted(compiled.field_ids))).tolist() == expected
    _check_keys(compiled, rows, expected)
    if any(expected):
        assert compiled.may_match(stats_of(batch))


def _check_keys(compiled: CompiledFilter, rows: list[Row], expected: list[bool]) -> None:
    allowed = compiled.primary_keys()
    if allowed is None:
        return
    for row, kept in zip(rows, expected, strict=True):
        assert not kept or row["id"] in allowed.values
        assert kept or not allowed.exact or row["id"] not in allowed.values


def stats_of(batch: Batch) -> dict[FieldId, FieldStats]:
    stats = {}
    for field_id, column in batch.columns.items():
        if isinstance(column, ScalarColumn) or (isinstance(column, StringColumn) and field_id != FieldId(108)):
            known = [value for value in column.to_list() if value is not None]
            order = (lambda v: v.encode()) if isinstance(column, StringColumn) else None
            least, most = (min(known, key=order), max(known, key=order)) if known else (None, None)
            stats[field_id] = FieldStats(least, most, batch.rows - len(known), batch.rows)
    return stats


@settings(max_examples=60, deadline=None)
@given(trees, rows_strategy())
def test_narrowing_changes_nothing(tree: Tree, rows: list[Row]) -> None:
    """`and` evaluates its later conditions on few rows only; the answer is as if it had on all."""
    many = [{**row, "small": 5} for row in rows * 9] + [{**row, "small": 99} for row in rows]
    compiled = compile_filter(f"small == 99 and ({show(tree)})", SCHEMA)
    expected = [holds(("and", [("cmp", "==", ("field", "small"), 99, False), tree]), row) is True for row in many]
    assert compiled.evaluate(batch_of(many)).tolist() == expected
