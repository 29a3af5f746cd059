r"""Numbers and strings as they are written, and back: C escapes, raw strings, four bases, hexadecimal floats.

In a string, `\%` and `\_` keep their backslash, so that `like "100\%"` and `like "100\\%"` are the same pattern.
"""

from __future__ import annotations

import json
import re
from datetime import UTC
from typing import Final

from storage.filter.syntax import Complaint, LiteralValue, Span
from storage.times import Moment, show_time

_SIMPLE: Final = {
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", "'": "'", '"': '"',
    "?": "?", "\n": "", "%": "\\%", "_": "\\_", "/": "/",
}  # fmt: skip
_ESCAPE: Final = re.compile(
    r"\\(?:([abfnrtv\\'\"?%_/\n])|([0-7]{1,3})|x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL
)
_QUOTED: Final = re.compile(r""""([^"\\]*)"|'([^'\\]*)'""")


def text_of(token: str, start: int) -> str:
    """Return the string a quoted token stands for; `start` is the token's column, for the complaint."""
    if token[0] in "rR":
        return token[2:-1]
    body = token[1:-1]
    if "\\" not in body:
        return body

    def replaced(found: re.Match[str]) -> str:
        simple, octal, *coded, other = found.groups()
        if simple is not None:
            return _SIMPLE[simple]
        if other is not None:
            at = (start + 1 + found.start(), start + 1 + found.end())
            raise Complaint(
                f"unknown escape \\{other} in a string", at, f'write \\\\{other}, or a raw string r"...{other}..."'
            )
        code = int(octal, 8) if octal is not None else int(next(c for c in coded if c is not None), 16)
        if code > 0x10FFFF:
            at = (start + 1 + found.start(), start + 1 + found.end())
            raise Complaint("not a character: above U+10FFFF", at)
        return chr(code)

    text = _ESCAPE.sub(replaced, body)
    if not is_unicode(text):
        try:  # "\ud83d\ude00", as JSON writes it, is one character
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            raise Complaint("half of a surrogate pair in a string", (start, start + len(token))) from None
    return text


def number_of(token: str, at: Span) -> int | float:
    """Return the number a token stands for; integers of any size, floats finite."""
    low = token.lower()
    if low.startswith("0x"):
        if any(mark in low for mark in ".p"):
            return _finite(float.fromhex, low if "p" in low else low + "p0", at)
        return int(low, 16)
    if low.startswith("0b"):
        return int(low, 2)
    if any(mark in low for mark in ".e"):
        return _finite(float, low, at)
    if len(low) > 40:
        raise Complaint("the integer does not fit 64 bits", at)
    if len(low) > 1 and low[0] == "0":
        try:
            return int(low, 8)
        except ValueError:
            raise Complaint(f"{token} is not octal", at, "a leading 0 means base 8: drop it") from None
    return int(low)


def is_unicode(text: str) -> bool:
    """Return whether the text has a UTF-8 form: JSON can smuggle in half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _finite(read: object, text: str, at: Span) -> float:
    assert callable(read)
    try:
        value = float(read(text))
    except OverflowError:
        value = float("inf")
    if value in (float("inf"), float("-inf")):
        raise Complaint("the number is too large for a double", at)
    return value


def numbers_of(token: str, at: Span) -> tuple[int | float, ...]:
    """Return the numbers of a whole list token `[1, 2, 3]`: one pass in C however many there are."""
    body = token[1:-1].rstrip().removesuffix(",")
    try:
        values = json.loads(f"[{body}]")
    except ValueError:  # an integer of thousands of digits
        raise Complaint("a number of the list does not fit 64 bits", at) from None
    if float("inf") in values or float("-inf") in values:
        raise Complaint("a number of the list is too large for a double", at)
    return tuple(values)


def strings_of(token: str) -> tuple[str, ...]:
    """Return the strings of a whole list token `["a", 'b']`, which has no escapes."""
    return tuple([double or single for double, single in _QUOTED.findall(token)])


def printed(value: LiteralValue) -> str:
    """Return a literal that reads back as this value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Moment):
        return f"ISO '{show_time(value, UTC)}'"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(printed(one) for one in value)}]"
