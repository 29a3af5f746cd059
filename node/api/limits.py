"""How much a request may hold: the number of its values is bounded before they become Python objects.

Bytes are bounded by the server, but a byte of JSON or CBOR can become a hundred bytes of objects, and the interpreter
is held while they are made and freed. So the text is looked at first, with counts that take a millisecond a megabyte:
every value of a list but its first follows a ',', every pair has a ':', every object has a '{'. Strings may hold those
characters too; the bounds on text leave room for that, and the exact numbers are checked on what was decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from node.api.exact import count_of
from storage.errors import InvalidParameter

KEYS_MAX: Final = 1000
"""Of an object with declared fields."""
LOOSE_COLONS_MAX: Final = 100_000
"""':' outside the declared fields of a body, before it is split into its keys."""
LIST_MAX: Final = 1024
"""Values of a list such as outputFields."""
IDS_MAX: Final = 16_384
"""Primary keys of one get or search."""
SPLIT_COMMAS_MAX: Final = 1 << 18
"""',' in the text of a list that is split to be counted: room for text with commas in it."""
MARKS_MAX: Final = 250_000
"""',', '[' and '{' in a field whose value is the client's to shape, such as exprParams or a schema."""
SEARCHES_MARKS_MAX: Final = 1_000_000
"""The same in the searches of a hybrid search, whose query vectors are in them."""
ROW_MARKS_MAX: Final = 4_000_000
"""'{' and ':' in the rows of one insert."""
ITEMS_MAX: Final = 2_000_000
"""Values of a CBOR body, without the numbers of lists of equal width."""
CONTAINERS_MAX: Final = 500_000
"""Lists and maps of a CBOR body."""
SMALL_CBOR_BYTES: Final = 64 << 10
"""A smaller body cannot hold values enough to matter."""
PROPERTIES_MAX: Final = 256
PROPERTY_NAME_MAX: Final = 255
PROPERTY_VALUE_MAX: Final = 65_535
OUTPUT_BYTES_MAX: Final = 100 << 20
"""Of the rows of one reply: Milvus's limit."""
ROW_BYTES: Final = 80
"""What a row costs beside its values: its share of the reply's text and of the objects that it is made from."""
LONG_BYTES_MIN: Final = 256 << 10
"""A CBOR byte string of this length is a column, and worth not to be copied: its copy would be in memory that is new to
the process, which takes ten times as long as to copy it."""
_WIDTHS: Final = {0x1A: 5, 0x1B: 9, 0x3A: 5, 0x3B: 9, 0xFA: 5, 0xFB: 9}
"""First byte of a CBOR number -> its length, where that is long enough for the body's size to bound their number."""


class LongBytes(NamedTuple):
    """Where a CBOR byte string stands in a body: its head, and its bytes."""

    head: int
    start: int
    stop: int


def check_list(name: str, count: int, limit: int) -> None:
    """Raise InvalidParameter if a list has more values than it may."""
    if count > limit:
        raise InvalidParameter(f"{name} has {count} values, at most {limit} are accepted: invalid parameter")


def check_list_text(name: str, raw: bytes, limit: int) -> None:
    """Raise InvalidParameter if the JSON text of a list holds so many ',' that it is not worth splitting."""
    commas = raw.count(b",")
    if commas > SPLIT_COMMAS_MAX:
        raise InvalidParameter(
            f"{name} has {commas + 1} values, counting its ',', at most {limit} are accepted: invalid parameter"
        )


def check_marks(name: str, raw: bytes, limit: int = MARKS_MAX) -> None:
    """Raise InvalidParameter if the JSON text of a value of any shape may hold more values than are accepted."""
    if len(raw) > limit and (marks := raw.count(b",") + raw.count(b"[") + raw.count(b"{")) > limit:
        raise InvalidParameter(
            f"{name} is too large: it holds {marks} of the characters ',', '[' and '{{', "
            f"at most {limit} are accepted: invalid parameter"
        )


def check_row_marks(raw: bytes) -> None:
    """Raise InvalidParameter if the JSON text of an insert's rows may hold more objects and keys than are accepted."""
    if len(raw) > ROW_MARKS_MAX and (marks := count_of(b"{", raw) + count_of(b":", raw)) > ROW_MARKS_MAX:
        raise InvalidParameter(
            f"data holds {marks} of the characters '{{' and ':', at most {ROW_MARKS_MAX} are accepted: "
            "send fewer rows in a request: invalid parameter"
        )


def check_cbor(body: bytes) -> list[LongBytes]:
    """Raise InvalidParameter if a CBOR body holds more values than are accepted; return its long byte strings in order.

    The items are walked head by head, one after the other, for which nesting does not matter. A list of numbers that
    all have the same head is stepped over as a whole. What is malformed ends the walk: decoding ends there too, and no
    byte string is returned. Nor is any of a body with tags.
    """
    if len(body) < SMALL_CBOR_BYTES:
        return []
    place, end, items, containers = 0, len(body), 0, 0
    long: list[LongBytes] = []
    has_tags = False
    while place < end:
        head, first = body[place], place
        place += 1
        items += 1
        major, size = head >> 5, head & 31
        if size >= 24:
            if size > 27:
                return []
            width = 1 << (size - 24)
            size = int.from_bytes(body[place : place + width], "big")
            place += width
        if major == 2 or major == 3:
            if major == 2 and size >= LONG_BYTES_MIN:
                long.append(LongBytes(first, place, place + size))
            place += size
        elif major == 4 or major == 5:
            containers += 1
            if containers > CONTAINERS_MAX:
                raise _too_many_items("lists and maps", CONTAINERS_MAX)
            if major == 4 and size > 1 and place < end:
                step = _WIDTHS.get(body[place], 0)
                last = place + step * size
                if step and last <= end and body[place:last:step].count(body[place]) == size:
                    place = last
        elif major == 6:
            has_tags = True
        if items > ITEMS_MAX:
            raise _too_many_items("values", ITEMS_MAX)
    return [] if has_tags or place != end else long


def _too_many_items(what: str, limit: int) -> InvalidParameter:
    return InvalidParameter(
        f"the CBOR body holds more than {limit} {what}: send fewer rows in a request, vectors as byte strings, or "
        "data as columns: invalid parameter"
    )


def check_properties(what: str, given: Mapping[str, Any]) -> None:
    """Raise InvalidParameter if there are too many properties, or a name or a value is too long."""
    if len(given) > PROPERTIES_MAX:
        raise InvalidParameter(f"{what} has {len(given)} entries, at most {PROPERTIES_MAX} are accepted")
    for name, value in given.items():
        if len(name) > PROPERTY_NAME_MAX:
            raise InvalidParameter(
                f"{what}: the name {name[:40]!r}... has {len(name)} characters, "
                f"at most {PROPERTY_NAME_MAX} are accepted"
            )
        if isinstance(value, str) and len(value) > PROPERTY_VALUE_MAX:
            raise InvalidParameter(
                f"{what}: the value of {name[:80]!r} has {len(value)} characters, "
                f"at most {PROPERTY_VALUE_MAX} are accepted"
            )


def check_output(rows: int, row_bytes: float) -> None:
    """Raise InvalidParameter if so many rows of this size make a reply larger than Milvus's limit."""
    total = int(rows * (ROW_BYTES + row_bytes))
    if total > OUTPUT_BYTES_MAX:
        raise InvalidParameter(
            f"the result is too large: {rows} rows take about {total} bytes, at most {OUTPUT_BYTES_MAX} are returned: "
            "ask for fewer rows or fields: invalid parameter"
        )
