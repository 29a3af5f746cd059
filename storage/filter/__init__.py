"""Filters: the expression language of Milvus, from text to a mask over columns.

    text ──parser──> syntax tree ──check (schema, templates)──> checked tree ──evaluate (batch)──> mask
                                                                      ├──pruning──> primary keys, segments to skip
                                                                      └──printing─> canonical text

A filter is compiled once per request with `compile_filter` and evaluated on many immutable batches, on any thread.
Whatever is wrong with it is a `FilterError` with a caret below the place and a suggestion, never another exception,
and never slow: text, words, nesting and patterns are bounded, the parser is LALR, regular expressions are RE2.

## What is true, false and unknown
A filter keeps the rows where it is true. Where a value is null, missing or not of the constant's kind, a comparison
is unknown, and stays so under `not`; that is SQL's three-valued logic, applied to JSON as Milvus decided to.
With m = meta["a"], `?` for unknown:

    m holds             m == 1   m != 1   not (m == 1)   m > 0   m in [1]   m not in [1]   m is null   exists m
    1, 1.0              true     false    false          true    true       false          false       true
    2                   false    true     true           true    false      true           false       true
    "1", true, [1], {}  ?        ?        ?              ?       ?          ?              false       true
    null, or no key     ?        ?        ?              ?       ?          ?              true        false
    meta itself null    ?        ?        ?              ?       ?          ?              true        false

`like`, `=~` and `!~` are unknown on what is not text; `json_contains*` and `array_length` on what is not an array;
`arr[7]` in a shorter array. `json_contains_any(m, [])` is false of every array, `json_contains_all(m, [])` true.
An empty list is no member: `m in []` is false of every value, `m not in []` true; both are unknown for null.

## Numbers
* Integers and doubles are compared as the real numbers they are, JSON numbers too (up to int64 and uint64).
* A Float column holds float32, and constants meet it as float32: `score == 0.1` finds a stored 0.1.
* Arithmetic on integers has 64 bits and wraps; `/` and `%` round towards zero. On Float it is float32's.
  Dividing by a constant zero is an error; a constant divided by a column is unknown where the column is 0.
* In constants an overflow is an error.

## Text
Order is by code point. A Bool has no order. `not a == b` means `not (a == b)`.

`text_match(f, "words")` is true where the field has one of the words, as its analyzer takes them apart;
`minimum_should_match=n` asks for n different ones. `phrase_match(f, "some words", slop)` asks for all of them in this
order, with `slop` as `words.py` says. Both are false if the analyzer leaves nothing of the words, unknown of null.

## Times
A Timestamptz field is compared with `ISO '2025-01-31T23:59:59+08:00'`; without an offset that is a time in the
collection's zone. `f + INTERVAL 'P1Y2M3DT4H5M6S'` is a later time, months counted by UTC's calendar.

## Not supported
text_match_fuzzy, random_sample, geometry, structs: a FilterError says
so by name.
"""

from storage.filter.compiled import CompiledFilter, compile_filter, everything
from storage.filter.parser import make_ready
from storage.filter.pruning import FieldStats, PrimaryKeys

__all__ = ["CompiledFilter", "compile_filter", "everything", "FieldStats", "PrimaryKeys", "make_ready"]
