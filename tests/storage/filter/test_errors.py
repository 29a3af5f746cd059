"""What is wrong with a filter is said with its place and a way out; nothing else than FilterError ever comes out."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storage.errors import FilterError
from storage.filter import compile_filter
from tests.storage.filter.model import SCHEMA, STATIC_SCHEMA, batch_of


def complaint(text: str, params: dict[str, Any] | None = None, *, dynamic: bool = False) -> str:
    with pytest.raises(FilterError) as caught:
        compile_filter(text, SCHEMA if dynamic else STATIC_SCHEMA, params)
    message = caught.value.message
    assert message.startswith("cannot parse expression: ")
    return message


@pytest.mark.parametrize(
    ("text", "marked", "says"),
    [
        ("id = 1", "=", "comparison is written `==`"),
        ("nmae == 'a'", "nmae", "field nmae not exist; did you mean name?"),
        ("unknown_field == 1", "unknown_field", "field unknown_field not exist"),
        ("name == red", "red", "field red not exist; text goes in quotes"),
        ("id & 1 == 1", "&", "for bits use brackets: (a & 1) == 1"),
        ("id == 1 & id == 2", "&", "join conditions with `and` or `&&`"),
        ("id == 1 | id == 2", "|", "join conditions with `or` or `||`"),
        ("id == 1 And id == 2", "And", "keywords are written and or AND"),
        ("id == 1 id == 2", "id", "unexpected 'id'"),
        ("name == \u201cred\u201d", "\u201c", "use plain quotes"),
        ('name == "red', '"red', "the string is not closed"),
        ("id == ", "", "ends too early"),
        ("(id == 1", "", "a ')' is missing"),
        ("id == 1)", ")", "a bracket too many"),
        ("id == 1;", ";", "one expression"),
        ("id == '1'", "==", "comparisons between Int64 and VarChar are not supported"),
        ("name == 1", "==", "comparisons between VarChar and Int64 are not supported"),
        ("flag == 1", "==", "comparisons between Bool and Int64 are not supported"),
        ("1 == 'a'", "==", "comparisons between Int64 and VarChar are not supported"),
        ("name == id", "==", "comparisons between VarChar and Int64 are not supported"),
        ("flag > true", ">", "Bool has no order"),
        ("id == id == id", "id == id", "a condition can not be compared"),
        ("words == ['x']", "==", "can not comparisons array fields directly; compare an element, words[0]"),
        ("words == nums", "==", "can not comparisons array fields directly"),
        ("doc == id", "==", "two column comparison with JSON type is not supported"),
        ("vector == 1", "vector", "filter on vector field vector is not supported"),
        ("[1, 2]", "[1, 2]", "predicate is not a boolean expression, its type is Array"),
        ("1", "1", "predicate is not a boolean expression, its type is Int64"),
        ("id + 1", "id + 1", "predicate is not a boolean expression, its type is Int64"),
        ("name", "name", "predicate is not a boolean expression, its type is VarChar"),
        ("id and flag", "id", "predicate is not a boolean expression"),
        ("id in [1, 'a']", "[1, 'a']", "mixes types"),
        ("id in [1, 2.5]", "[1, 2.5]", "value '2.5' in list cannot be casted to Int64"),
        ("name in [1]", "[1]", "value '1' in list cannot be casted to VarChar"),
        ("id in 5", "5", "right of `in` stands a list; write [...] around the values"),
        ("id in [small]", "small", "a list holds constants"),
        ("words in ['a']", "words", "use array_contains_any"),
        ("doc['a'] in [[1]]", "[[1]]", "a list in the list of `in` is not supported"),
        ("id / 0 == 1", "id / 0", "division or modulus by zero"),
        ("1 % 0 == 1", "1 % 0", "division or modulus by zero"),
        ("amount % 2 == 1", "amount % 2", "modulo can only apply on integer types"),
        ("amount | 2 == 1", "|", "can not be used on conditions"),
        ("(amount | 2) == 1", "(amount | 2)", "| works on the bits of integers"),
        ("id + small == 1", "+", "arithmetic between two fields is not supported"),
        ("name + 'a' == 'b'", "name", "+ can not be used on VarChar"),
        ("words + 1 == 2", "words", "on one element it can: field[0]"),
        ("2 ** id == 4", "2 ** id", "** takes the field on its left"),
        ("id << 64 == 1", "id << 64", "a shift goes by 0 to 63 bits"),
        ("id == 9223372036854775808", "9223372036854775808", "does not fit 64 bits"),
        ("id == 9223372036854775807 + 1", "9223372036854775807 + 1", "does not fit 64 bits"),
        ("id in [1, 9223372036854775808]", "[1, 9223372036854775808]", "does not fit 64 bits"),
        ("id == 2 ** 2 ** 99", "2 ** 99", "does not fit 64 bits"),
        ("amount == 1e400", "1e400", "too large for a double"),
        ("id == 09", "09", "drop it"),
        ("1 < id > 2", "<", "point the same way"),
        ("id < 2 < 3", "<", "a range is a field between two constants"),
        ("1 < id < 2 < 3", "<", "one lower and one upper bound"),
        ("id like 'a'", "id", "like operation on non-string or no-json field is unsupported"),
        ("name like 5", "5", "must be a string literal or template variable"),
        ("name like 'a\\\\'", "'a\\\\'", "ends in a single backslash"),
        ("id =~ 'a'", "id", "regex match on non-string or non-json field"),
        ("name =~ other", "other", "must be a string literal or template variable"),
        ("name =~ '[abc'", "'[abc'", "invalid regex pattern: missing closing ]"),
        ("name =~ '(abc'", "'(abc'", "invalid regex pattern: missing closing )"),
        ("name =~ '\\d'", "\\d", 'write \\\\d, or a raw string r"...d..."'),
        ("exists name", "name", "exists operation are only supported on json keys and dynamic fields"),
        ("exists doc", "doc", "exists operation are only supported on json keys"),
        ("(id + 1) is null", "is null", "unexpected 'is null'"),
        ("name['a'] == 1", "name['a']", "only JSON and Array fields take brackets"),
        ("words['a'] == 'x'", "words['a']", "one whole number goes in its brackets"),
        ("doc[a] == 1", "doc[a]", "struct form of a field is not supported by this server"),
        ("$meta['a'] == 1", "$meta['a']", "field $meta not exist"),
        ("json_contain(doc, 1)", "json_contain(doc, 1)", "did you mean json_contains?"),
        ("foo()", "foo()", "function foo is not found"),
        ("array_length(name) > 1", "name", "only supported on json or array fields"),
        ("array_length(nums, 1) > 1", "array_length(nums, 1)", "array_length takes 1 argument"),
        ("array_contains(nums, 'a')", "'a'", "value 'a' cannot be casted to Int32, an element of nums"),
        ("array_contains(nums, 1.5)", "1.5", "cannot be casted to Int32"),
        ("array_contains_any(nums, 1)", "1", "contains_any operation element must be an array"),
        ("text_match(name, 'a', minimum_should_match=2)", "name", "field name does not enable match"),
        ("phrase_match(name, 'a', 2)", "name", "field name does not enable match"),
        ("TEXT_MATCH_FUZZY(name, 'a', max_edit_distance=1)", "TEXT_", "text_match_fuzzy is not supported by"),
        ("id > 1 and random_sample(0.1)", "random_sample(0.1)", "random_sample is not supported by this server"),
        ("st_within(geo, 'POINT (1 1)')", "st_within(", "st_within is not supported by this server"),
        ("element_filter(s, $[sub] > 1)", "element_filter(", "element_filter is not supported by this server"),
        ("membership_match(id, 1)", "membership_match(", "membership_match is not supported by this server"),
        ("ts + interval 5 >= iso '2025-01-01T00:00:00Z'", "5", "interval stands before a text in quotes"),
        ("id == {x}", "{x}", "the value of expression template variable name {x} is not found"),
        ("id == {null}", "{null}", "is null: only numbers"),
        ("id in {none}", "{none}", "is an empty list"),
        ("id == {dict}", "{dict}", "is dict: only numbers"),
        ("id == {big}", "{big}", "does not fit 64 bits"),
        ("amount == {nan}", "{nan}", "is not a finite number"),
        ("id == {deep}", "{deep}", "nests deeper than 100"),
        ("name in {half}", "{half}", "has half of a surrogate pair"),
        ("id == {bog}", "{bog}", "is not found; did you mean big?"),
        ("id ==\n  1 and\n  nmae == 'x' or\n id == 3", "nmae", "did you mean name?"),
    ],
)  # fmt: skip
def test_the_caret_points_at_the_fault(text: str, marked: str, says: str) -> None:
    """The last line of the message underlines the words at fault in the line before it."""
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    params = {"null": None, "none": [], "dict": {}, "big": 2**63, "nan": float("nan"), "deep": deep, "half": ["\ud800"]}
    message = complaint(text, params)
    assert says in message
    *_, line, carets = message.split("\n")
    start = carets.index("^")
    assert (line + " ")[start:].startswith(marked or " ")
    assert len(carets) - start >= 1 and set(carets.strip()) == {"^"}


def test_a_message_in_full() -> None:
    """Text first, then what is wrong and how to help, then the line and the caret."""
    assert complaint("flag and colour = 'red'") == (
        "cannot parse expression: flag and colour = 'red', error: unexpected '='; comparison is written `==`\n"
        "    flag and colour = 'red'\n"
        "                    ^"
    )


def test_unquoted_text_is_found_out_with_a_dynamic_field() -> None:
    """An unknown name is a dynamic key there, but two fields are no comparison with JSON."""
    message = complaint("name == red", dynamic=True)
    assert 'red is no field; text goes in quotes: "red"' in message


def test_long_expressions_are_shown_in_part() -> None:
    """The message stays short, and the caret stays under its word."""
    message = complaint(f"{' or '.join(['flag'] * 900)} or nmae == 'a' or {' or '.join(['flag'] * 900)}")
    assert len(message) < 700
    *_, line, carets = message.split("\n")
    assert line[carets.index("^") :].startswith("nmae") and line.strip().startswith("...") and line.endswith("...")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("(" * 10_000 + "id == 1" + ")" * 10_000, id="brackets"),
        pytest.param("[" * 1_000_000, id="open lists"),
        pytest.param("not " * 10_000 + "flag", id="not"),
        pytest.param("id == " + "-" * 100_000 + "1", id="minus"),
        pytest.param("id" + " + 1" * 10_000 + " == 1", id="sums"),
        pytest.param("id == 1" + " and id == 1" * 90_000, id="ands"),
        pytest.param("id in [" + "1," * 500_000 + "x]", id="a bad list"),
        pytest.param("id == " + "9" * 1_000_000, id="digits"),
        pytest.param("name == '" + "a" * 5_000_000 + "'", id="text"),
        pytest.param('"' * 1_000_001, id="quotes"),
        pytest.param("name =~ '" + "(a*)*" * 20_000 + "'", id="regex"),
        pytest.param("name =~ '(((a{100}){100}){100}){100}'", id="repetition"),
        pytest.param("x" * 1_000_000 + " == 1", id="name"),
        pytest.param("name == '" + "\\" * 1_000_001, id="backslashes"),
        pytest.param("id == 2" + " ** 2" * 5_000, id="powers"),
        pytest.param("[1," * 300_000, id="lists begun"),
    ],
)
def test_no_text_is_too_much(text: str) -> None:
    """Nesting, length and hostile patterns end in FilterError, soon."""
    before = time.process_time()
    complaint(text)
    assert time.process_time() - before < 3


def test_wide_filters_within_the_bounds_work() -> None:
    """Thousands of conditions side by side are no nesting."""
    rows = batch_of([{"id": 7, "other": "", "$meta": {}}])
    text = " or ".join(f"id == {i}" for i in range(3_000))
    assert compile_filter(text, SCHEMA).evaluate(rows).all()
    assert compile_filter("(" * 100 + "id == 7" + ")" * 100, SCHEMA).evaluate(rows).all()


WORDS = (
    "id small ratio name flag doc words nums k and or not in like is null exists == != < <= > >= = =~ !~ + - * / % ** "
    "& | ^ ~ << >> ( ) [ ] { } , 1 0 2.5 -7 1e9 0x1f 9223372036854775808 'a' \"b%\" r'\\d' true false "
    "json_contains array_length array_contains_all text_match {n} $meta $ ! \n \\ ' \" interval"
).split(" ")


@settings(max_examples=300, deadline=2000)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join)))
@example("1 < id < small")
@example("'\\U00110000' == name")
@example("'\\ud800' == name")
@example("id == 1e-400 ** -1")
@example("exists exists k")
@example("(-8) ** 0.5 == 1")
@example("0.0 ** -1 == 1")
@example("not true == false in [1]")
@example("{n} is null")
@example("\ud800")
@example("name == '\ud800'")
@example("doc['\ud800'] == 1")
def test_any_text_compiles_or_complains(text: str) -> None:
    """No words in any order raise anything but FilterError, when compiling or when evaluating."""
    rows = batch_of(
        [{"id": 1, "small": 1, "ratio": 0.5, "name": "a", "other": "", "flag": True, "doc": {}, "$meta": {}}]
    )
    try:
        compiled = compile_filter(text, SCHEMA, {"n": 1})
    except FilterError as error:
        assert error.message.startswith("cannot parse expression: ")
        error.message.encode()
        return
    assert compile_filter(compiled.text, SCHEMA).evaluate(rows).tolist() == compiled.evaluate(rows).tolist()


@settings(max_examples=100, deadline=2000)
@given(st.binary(max_size=40))
def test_bytes_as_text_compile_or_complain(data: bytes) -> None:
    """Nor does any byte string that was decoded somehow."""
    for text in (data.decode("latin-1"), data.decode("utf-8", "replace"), f"name == '{data.decode('latin-1')}'"):
        try:
            compile_filter(text, SCHEMA)
        except FilterError:
            continue
