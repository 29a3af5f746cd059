"""Tables of filters over five rows: each form of the language, and which rows it keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from storage.columns import Batch, ScalarColumn
from storage.filter import PrimaryKeys, compile_filter, everything
from tests.storage.filter.model import SCHEMA, Row, batch_of

ROWS: list[Row] = [
    {
        "id": 1, "small": 1, "whole": 2**53 + 1, "ratio": 0.1, "amount": 0.1, "name": "red", "other": "red",
        "flag": True, "doc": {"a": 1, "list": [1, 2, "x", [1, 2]], "deep": {"k": [10, {"z": "end"}]}},
        "words": ["x", "y"], "nums": [1, 2, 3], "marks": [0.1], "$meta": {"k": 1, "color": "red"},
    },
    {
        "id": 2, "small": -7, "whole": 2**63 - 1, "ratio": 2.5, "amount": 2.0**53, "name": "green\nblue", "other": "g",
        "flag": False, "doc": {"a": "1", "list": [], "u": 2**64 - 1}, "words": [], "nums": [2], "marks": [],
        "$meta": {"k": 1.0, "t": True},
    },
    {
        "id": 3, "small": None, "whole": None, "ratio": None, "amount": None, "name": None, "other": "", "flag": None,
        "doc": None, "words": None, "nums": [], "marks": [2.5, 0.1], "$meta": {},
    },
    {
        "id": 4, "small": 127, "whole": -(2**63), "ratio": -0.5, "amount": 1e300, "name": "100%_é", "other": "zz",
        "flag": True, "doc": {"a": None, "list": "x"}, "words": ["é"], "nums": [3, 3], "marks": [1.0],
        "$meta": {"k": "1"},
    },
    {
        "id": 5, "small": 0, "whole": 0, "ratio": 0.0, "amount": -0.0, "name": "", "other": "a", "flag": False,
        "doc": {"a": 2.5, "list": [2.0, True]}, "words": ["x"], "nums": [-1, 5, 9], "marks": [], "$meta": {"k": 2**60},
    },
]  # fmt: skip
BATCH = batch_of(ROWS)
PARAMS: dict[str, Any] = {
    "n": 2,
    "name": "red",
    "ids": [1, 4],
    "texts": ["red", ""],
    "no": False,
    "pat": "%e%",
    "f": 0.1,
}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        # literals
        ("id == 0x4", [4]), ("id == 0b11", [3]), ("id == 05", [5]), ("id == 4.0", [4]), ("id == 0x1p2", [4]),
        ("id < 2.5", [1, 2]), ("2 <= id", [2, 3, 4, 5]), ("whole == -9223372036854775808", [4]),
        ("id in [1, 3,]", [1, 3]), ("id IN [2]", [2]), ("id in []", []), ("id not in []", [1, 2, 3, 4, 5]),
        ("small in []", []), ("small not in []", [1, 2, 4, 5]), ("name == 'red'", [1]), ('name == r"red"', [1]),
        ('name == "\\x72\\145d"', [1]), ('name == "100%_\\u00e9"', [4]), ('name == "green\\nblue"', [2]),
        # logic and words
        ("id == 1 or id == 2 and flag", [1]), ("id == 1 || id == 2 && flag == false", [1, 2]),
        ("(id == 1 OR id == 2) AND flag", [1]), ("not flag", [2, 5]), ("!(flag == true)", [2, 5]),
        ("not not flag", [1, 4]), ("not small == 1", [2, 4, 5]), ("NOT small IN [1, 0]", [2, 4]),
        ("true", [1, 2, 3, 4, 5]), ("false", []), ("1 == 1 and id == 2", [2]), ('"a" < "b"', [1, 2, 3, 4, 5]),
        ("flag == true or small is null", [1, 3, 4]), ("flag in [true]", [1, 4]), ("flag != TRUE", [2, 5]),
        # numbers are exact, Float meets constants as float32
        ("ratio == 0.1", [1]), ("ratio in [0.1, 2.5]", [1, 2]), ("ratio < 0.1", [4, 5]), ("amount == 0.1", [1]),
        ("whole == 9007199254740992.0", []), ("whole > 9007199254740992.0", [1, 2]), ("whole == 9007199254740993", [1]),
        ("amount == 9007199254740993", []), ("amount < 9007199254740993", [1, 2, 5]), ("whole < 9.3e18", [1, 2, 4, 5]),
        ("amount == 9007199254740992", [2]), ("small == 300", []), ("small < 300", [1, 2, 4, 5]),
        ("small != 1.5", [1, 2, 4, 5]),
        ("marks[0] == 0.1", [1]), ("array_contains(marks, 0.1)", [1, 3]),
        # ranges, folding, arithmetic
        ("1 < id <= 3", [2, 3]), ("3 >= id > 1", [2, 3]), ("10-9 < id < 2*2", [2, 3]), ("2**2 == id", [4]),
        ("id + 1 == 3", [2]), ("1 + id == 3", [2]), ("10 - id == 7", [3]), ("id * 2 >= 8", [4, 5]),
        ("id % 2 == 0", [2, 4]),
        ("small / 2 == -3", [2]), ("small % 2 == -1", [2]), ("12 / small == -1", [2]), ("12 / small == 0", [4]),
        ("id ** 2 == 9", [3]), ("(id & 1) == 1", [1, 3, 5]), ("(id | 1) == 3", [2, 3]), ("(id ^ 3) == 0", [3]),
        ("id << 2 == 16", [4]), ("id >> 1 == 1", [2, 3]), ("-id < -3", [4, 5]), ("~id == -3", [2]),
        ("id / 2.0 == 1.5", [3]),
        ("whole + 1 < 0", [2, 4]), ("small + 1 == 128", [4]), ("ratio * 2 == 0.2", [1]),
        ("-7 / 2 == -3", [1, 2, 3, 4, 5]),
        ("-7 % 2 == -1", [1, 2, 3, 4, 5]), ("1 + 2 * 3 == 7", [1, 2, 3, 4, 5]), ("2 ** 3 ** 2 == 512", [1, 2, 3, 4, 5]),
        ("-2 ** 2 == -4", [1, 2, 3, 4, 5]), ("1 << 2 + 1 == 8", [1, 2, 3, 4, 5]), ("(id + 1) * 2 == 6", [2]),
        # fields with fields
        ("name == other", [1]), ("name > other", [2]), ("small < id", [2, 5]), ("ratio < amount", [2, 4]),
        ("whole > amount", [1, 2]),
        ("small == whole", [5]),
        # like
        ('name like "re%"', [1]), ('name like "%e"', [2]), ('name like "%e%"', [1, 2]), ('name like "red"', [1]),
        ('name like "r_d"', [1]), ('name like "%"', [1, 2, 4, 5]), ('name like ""', [5]), ('name like "%\\%%"', [4]),
        ('name like "%\\\\%%"', [4]), ("name like '100\\%\\__'", [4]), ('name like "g%n_blue"', [2]),
        ('not name like "re%"', [2, 4, 5]), ('name like "______"', [4]), ('NAME_ like "a"', []),
        # regular expressions
        ('name =~ "^re"', [1]), ('name =~ "n.b"', [2]), ('name =~ "(?-s)n.b"', []), ('name =~ "(?i)RED"', [1]),
        ('name !~ "e"', [4, 5]), (r'name =~ r"^\d+%"', [4]), ('name =~ "^$"', [5]), ('words[0] =~ "x|y"', [1, 5]),
        # null
        ("small is null", [3]), ("small IS NOT NULL", [1, 2, 4, 5]), ("id is null", []), ("words is null", [3]),
        ("doc is null", [3]), ('doc["a"] is null', [3, 4]), ('doc["a"] is not null', [1, 2, 5]), ("k is null", [3]),
        ("small != 1 or small == 1", [1, 2, 4, 5]), ("not (small == 1 and id == 3)", [1, 2, 4, 5]),
        # JSON
        ('doc["a"] == 1', [1]), ('doc["a"] != 1', [5]), ('not (doc["a"] == 1)', [5]), ('doc["a"] == "1"', [2]),
        ('doc["a"] > 0', [1, 5]), ('doc["a"] in [1, 2.5]', [1, 5]), ('doc["a"] not in [1]', [5]),
        ('doc["a"] in ["1"]', [2]),
        ('doc["deep"]["k"][0] == 10', [1]), ('doc["deep"]["k"][1]["z"] like "%d"', [1]),
        ('doc["deep"]["k"][7] == 10', []),
        ('doc["u"] == 1.8446744073709552e19', []), ('doc["u"] > 9223372036854775807', [2]), ('doc["u"] > 1e19', [2]),
        ('exists doc["a"]', [1, 2, 5]), ('not exists doc["a"]', [3, 4]), ('exists k', [1, 2, 4, 5]),
        ('doc["a"] + 1 == 3.5', [5]), ('doc["a"] * 2 == 2', [1]), ('doc["a"] !~ "z"', [2]), ('doc["a"] =~ "1"', [2]),
        ("k == 1", [1, 2]), ('$meta["k"] == 1', [1, 2]), ('k == "1"', [4]), ("k == 1152921504606846976", [5]),
        ("t == true", [2]),
        ('color == "red"', [1]), ("t", None), ('doc["list"] == [1, 2, "x", [1, 2.0]]', [1]), ('doc["list"] == []', [2]),
        ('doc["list"] != []', [1, 5]), ("-1 < k < 2", [1, 2]),
        # containment
        ('json_contains(doc["list"], 2)', [1, 5]), ('json_contains(doc["list"], [1, 2])', [1]),
        ('JSON_CONTAINS(doc["list"], true)', [5]), ('not json_contains(doc["list"], 2)', [2]),
        ('json_contains_all(doc["list"], [2, "x"])', [1]), ('json_contains_any(doc["list"], ["x", true])', [1, 5]),
        ('json_contains_all(doc["list"], [])', [1, 2, 5]), ('json_contains_any(doc["list"], [])', []),
        ('array_contains(words, "x")', [1, 5]), ('ARRAY_CONTAINS_ALL(words, ["x", "y"])', [1]),
        ("array_contains_any(nums, [1, 9])", [1, 5]), ("json_contains(nums, 3)", [1, 4]),
        ("not array_contains(nums, 3)", [2, 3, 5]),
        ('not array_contains(words, "x")', [2, 4]), ("array_length(nums) > 1", [1, 4, 5]),
        ("array_length(words) == 0", [2]),
        ('array_length(doc["list"]) == 2', [5]), ("array_length(nums) * 2 == 4", [4]), ("nums[1] == 2", [1]),
        ("not nums[1] == 2", [4, 5]),
        ('words[0] in ["x"]', [1, 5]), ("nums[0] < nums[1]", [1, 5]), ("nums[0] + 1 == 3", [2]),
        # templates
        ("id == {n}", [2]), ("id in {ids}", [1, 4]), ("name in {texts}", [1, 5]), ("name like {pat}", [1, 2]),
        ("flag == {no}", [2, 5]), ("ratio == {f}", [1]), ("id in [{n}, 5]", [2, 5]), ("id + {n} == 4", [2]),
        ("name =~ {name}", [1]),
        ("array_contains_any(nums, {ids})", [1]), ("{n} < id", [3, 4, 5]),
        ("  ", [1, 2, 3, 4, 5]), ("", [1, 2, 3, 4, 5]), ("\tid\n==\r1 ", [1]),
    ],
)  # fmt: skip
def test_rows_kept(text: str, kept: list[int] | None) -> None:
    """The filter keeps these rows, and so does its canonical text; None marks what does not compile."""
    if kept is None:
        with pytest.raises(Exception, match="not a boolean expression"):
            compile_filter(text, SCHEMA)
        return
    compiled = compile_filter(text, SCHEMA, PARAMS)
    assert (np.flatnonzero(compiled.evaluate(BATCH)) + 1).tolist() == kept
    again = compile_filter(compiled.text, SCHEMA)
    assert again.text == compiled.text
    assert (np.flatnonzero(again.evaluate(BATCH)) + 1).tolist() == kept


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("id==1and flag", 'id == 1 and flag == true'),
        ("1 < id <= 3", "id > 1 and id <= 3"),
        ("id == 1 or (id == 2 or flag)", "id == 1 or id == 2 or flag == true"),
        ("not (not flag) and true", "flag == true"),
        ('k > 3 and $meta["a b"] is not null', '$meta["k"] > 3 and $meta["a b"] is not null'),
        ("id not in {ids}", "id not in [1, 4]"),
        ("10 - id * 2 == 4", "(10 - (id * 2)) == 4"),
        ("name !~ 'a' or not name like \"a\\%\"", 'name !~ "a" or not (name like "a\\\\%")'),
        ("id == 1 and 1 > 2", "false"),
    ],
)  # fmt: skip
def test_canonical_text(text: str, expected: str) -> None:
    """Constants are folded, templates filled in, dynamic keys spelled out, chains flattened."""
    assert compile_filter(text, SCHEMA, PARAMS).text == expected


def test_what_it_reads() -> None:
    """Fields are named once each, the dynamic field by its own id."""
    by_name = SCHEMA.by_name
    compiled = compile_filter("id == 1 and (name is null or k + 1 > 2) and array_length(nums) > small - 1", SCHEMA)
    assert compiled.field_ids == {by_name[name].id for name in ("id", "name", "$meta", "nums", "small")}
    assert compile_filter("", SCHEMA).field_ids == frozenset()
    assert compile_filter("true", SCHEMA).always_true and everything(SCHEMA).always_true
    assert not compile_filter("id > 0", SCHEMA).always_true


def test_columns_a_batch_lacks_are_null() -> None:
    """A nullable field that the rows know nothing of is null in each of them; a field they must have is a bug."""
    batch = Batch({SCHEMA.primary.id: ScalarColumn(np.array([1, 2], np.int64))}, 2)
    for text in ("small is null", "name is null", "words is null", "doc is null", "k is null", 'doc["a"] is null'):
        assert compile_filter(text, SCHEMA).evaluate(batch).all()
        assert compile_filter(text, SCHEMA).evaluate(batch, np.array([1])).all()
    texts = (
        "small == 0",
        "not small == 0",
        'name like "%"',
        'words[0] == ""',
        "array_length(words) == 0",
        "k != 1",
        "flag",
    )
    for text in texts:
        assert not compile_filter(text, SCHEMA).evaluate(batch).any()
    with pytest.raises(AssertionError, match="no column for field other"):
        compile_filter('other == ""', SCHEMA).evaluate(batch)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("id == 3", PrimaryKeys((3,), True)),
        ("3 == id", PrimaryKeys((3,), True)),
        ("id == 3.5", PrimaryKeys((), True)),
        ("id in [3, 1, 3]", PrimaryKeys((3, 1), True)),
        ("id in [1, 2, 3] and id in [3, 2]", PrimaryKeys((2, 3), True)),
        ("id in [1, 2] and flag", PrimaryKeys((1, 2), False)),
        ("id == 1 or id in [5, 1]", PrimaryKeys((1, 5), True)),
        ("id == 1 or id == 2 and flag", PrimaryKeys((1, 2), False)),
        ("id == 1 and id == 2", PrimaryKeys((), True)),
        ("id == 1 and false", PrimaryKeys((), True)),
        ("id == 1 or flag", None),
        ("id != 1", None),
        ("id not in [1]", None),
        ("not id != 1", None),
        ("id + 0 == 1", None),
        ("small == 1", None),
        ("", None),
    ],
)
def test_primary_keys(text: str, keys: PrimaryKeys | None) -> None:
    """Keys come out of equality, lists and their combinations, each once, and say whether they are all there is."""
    assert compile_filter(text, SCHEMA).primary_keys() == keys


def test_large_lists() -> None:
    """100,000 keys in the text or in a template answer exactly."""
    keys = list(range(0, 200_000, 2))
    batch = Batch({SCHEMA.primary.id: ScalarColumn(np.arange(60_000, dtype=np.int64))}, 60_000)
    for text, params in ((f"id in {keys}", {}), ("id in {keys}", {"keys": keys})):
        compiled = compile_filter(text, SCHEMA, params)
        assert compiled.evaluate(batch).tolist() == [i % 2 == 0 for i in range(60_000)]
        found = compiled.primary_keys()
        assert found is not None and found.exact and len(found.values) == 100_000
    names = [f"n{i}" for i in range(100_000)]
    assert not compile_filter(f"name in {names}", SCHEMA).evaluate(BATCH).any()
    assert compile_filter("name in {names}", SCHEMA, {"names": [*names, "red"]}).evaluate(BATCH).tolist()[0]
