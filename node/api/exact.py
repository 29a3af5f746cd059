"""JSON read without loss: no duplicate keys, no rounded integers, no infinite floats, no bottomless nesting.

orjson is fast but takes the last of duplicate keys and turns integers beyond 64 bits into floats. `loads` lets it
parse, then counts: every pair of an object has one ':' outside strings, so a text whose ':' are all accounted for by
the parsed pairs and strings has lost none. The count is blind only where a string hides a ':' behind an escape. What
cannot be vouched for is read again, slowly, by the standard library with hooks.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, NoReturn

import msgspec
import numpy as np
import orjson

DEPTH_MAX: Final = 100
INTEGER_MIN: Final = -(1 << 63)
INTEGER_MAX: Final = (1 << 64) - 1
_LONG_BYTES: Final = 1 << 20
_SUSPECT_FLOAT: Final = float(1 << 63)
_ONE_KEY: Final = re.compile(rb'\s*[{,]\s*"(?:[^"\\]|\\.)*+"\s*:\s*')
_split = msgspec.json.Decoder(dict[str, msgspec.Raw])
_split_list = msgspec.json.Decoder(list[msgspec.Raw])


class NotExact(ValueError):
    """The text is no JSON, or JSON that would not survive; the message says what and where."""


def count_of(mark: bytes, text: bytes) -> int:
    """Return how often one character is in a text; in a long one without keeping other threads waiting."""
    if len(text) < _LONG_BYTES:
        return text.count(mark)
    codes = np.frombuffer(text, np.uint8)
    slices = (codes[start : start + _LONG_BYTES] for start in range(0, len(codes), _LONG_BYTES))
    return sum(int(np.count_nonzero(some == mark[0])) for some in slices)


def loads(raw: bytes) -> Any:
    """Return the document, its integers exact (int64 or uint64). Raises NotExact."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise NotExact(f"invalid JSON: {error}") from None
    kind = type(value)
    if kind is str or kind is bool or value is None or (kind is int and INTEGER_MIN <= value <= INTEGER_MAX):
        return value
    scan = _Scan()
    scan.walk(value, 0)
    if scan.suspect or scan.colons != raw.count(b":") or b"\\u003" in raw:
        value = _slow(raw)
    return value


def split_object(raw: bytes | msgspec.Raw) -> dict[str, msgspec.Raw]:
    """Return the pairs of an object, values as raw JSON. Raises NotExact, also for a key given twice."""
    try:
        pairs = _split.decode(raw)
    except msgspec.ValidationError as error:
        raise NotExact(f"not an object: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotExact(f"invalid JSON: {error}") from None
    except RecursionError:
        raise NotExact(f"nested deeper than {DEPTH_MAX} levels") from None
    data = raw if type(raw) is bytes else bytes(raw)
    colons = len(pairs)
    for key, value in pairs.items():
        colons += count_of(b":", bytes(value))
        if ":" in key:
            colons = -1  # an escaped ':' in a key would break the count
            break
    if colons != count_of(b":", data):
        _check_pairs(raw, pairs)
    return pairs


def split_list(raw: bytes | msgspec.Raw) -> list[msgspec.Raw]:
    """Return the elements of a list as raw JSON. Raises NotExact."""
    try:
        return _split_list.decode(raw)
    except msgspec.ValidationError:
        raise NotExact(f"a list is expected, got {kind_of(bytes(raw))}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotExact(f"invalid JSON: {error}") from None
    except RecursionError:
        raise NotExact(f"nested deeper than {DEPTH_MAX} levels") from None


def kind_of(raw: bytes) -> str:
    """Return what Go's decoder calls a JSON value: string, number, bool, array, object or null."""
    first = raw[:1]
    return {b'"': "string", b"t": "bool", b"f": "bool", b"n": "null", b"[": "array", b"{": "object"}.get(
        first, "number"
    )


class _Scan:
    """Counts the ':' that a parsed document accounts for and notes what orjson may have rounded."""

    __slots__ = ("colons", "suspect")

    def __init__(self) -> None:
        self.colons = 0
        self.suspect = False

    def walk(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind is str:
            self.colons += value.count(":")
        elif kind is float:
            if not -_SUSPECT_FLOAT < value < _SUSPECT_FLOAT:
                self.suspect = True
        elif kind is dict:
            if depth >= DEPTH_MAX:
                raise NotExact(f"nested deeper than {DEPTH_MAX} levels")
            self.colons += len(value)
            for key, inner in value.items():
                self.colons += key.count(":")
                self.walk(inner, depth + 1)
        elif kind is list:
            if depth >= DEPTH_MAX:
                raise NotExact(f"nested deeper than {DEPTH_MAX} levels")
            for inner in value:
                self.walk(inner, depth + 1)


def _slow(raw: bytes) -> Any:
    """Return the document read with hooks; orjson has found it well-formed and not too deep."""
    return json.loads(
        raw, object_pairs_hook=_distinct, parse_int=_integer, parse_float=_finite, parse_constant=_constant
    )


def _check_pairs(raw: bytes | msgspec.Raw, pairs: dict[str, msgspec.Raw]) -> None:
    """Raise NotExact if an object's own keys repeat; what its values hold is judged where they are read.

    Each key has the place of its first pair and the value of its last. So the values lie in the text in their order,
    with one key before each, up to the first key that is given twice: the gap before its value holds more.
    """
    text = memoryview(raw)
    origin = _address(text)
    end = 0
    for key, value in pairs.items():
        span = memoryview(value)
        start = _address(span) - origin
        if start < end or not _ONE_KEY.fullmatch(text, end, start):
            raise NotExact(f"duplicate key {key[:80]!r}")
        end = start + len(span)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise NotExact(f"duplicate key {key[:80]!r}")
            seen.add(key)
    return found


def _integer(text: str) -> int:
    if len(text) > 20 or not INTEGER_MIN <= (value := int(text)) <= INTEGER_MAX:
        raise NotExact(f"integer {text[:40]} does not fit in 64 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise NotExact(f"number {text[:40]} is too large for a double")
    return value


def _constant(text: str) -> NoReturn:
    raise NotExact(f"{text} is not JSON")
