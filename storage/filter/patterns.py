r"""LIKE patterns and regular expressions: what they mean, and the cheapest operation that answers them.

In LIKE, `%` is any run of characters, `_` is one, a backslash takes the next character as it is. A pattern without
inner wildcards is a comparison, a prefix, a suffix or a substring; the rest become RE2. Regular expressions are
unanchored and `.` matches a newline unless the pattern says `(?-s)`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from storage.strings import PatternInvalid, StringArray, check_pattern

Mask = npt.NDArray[np.bool_]
PATTERN_CHARS_MAX: Final = 10_000
"""RE2's time is linear in the text times the pattern's size; this bounds the second."""


@dataclass(frozen=True, slots=True)
class LikePattern:
    """`text` as written; `how` to search for `literal`, or RE2 in `literal` if `how` is "regex"."""

    text: str
    how: Literal["equal", "prefix", "suffix", "contains", "any", "regex"]
    literal: str


def like_pattern(text: str) -> LikePattern:
    """Return the compiled LIKE pattern. Raises PatternInvalid for a backslash at the end, or if it is too long."""
    _check_length(text)
    parts: list[str | None] = []  # None is %, "" is _, else one character
    characters = iter(text)
    for character in characters:
        if character == "\\":
            taken = next(characters, None)
            if taken is None:
                raise PatternInvalid("the pattern ends in a single backslash")
            parts.append(taken)
        elif character == "%":
            if not parts or parts[-1] is not None:
                parts.append(None)
        else:
            parts.append("" if character == "_" else character)
    starts, ends = bool(parts) and parts[0] is None, bool(parts) and parts[-1] is None
    if parts == [None]:
        return LikePattern(text, "any", "")
    middle = parts[starts : len(parts) - ends]
    if all(middle):
        literal = "".join(one for one in middle if one)
        how: dict[tuple[bool, bool], Literal["equal", "prefix", "suffix", "contains"]] = {
            (False, False): "equal", (False, True): "prefix", (True, False): "suffix", (True, True): "contains",
        }  # fmt: skip
        return LikePattern(text, how[starts, ends], literal)
    body = "".join("(?:.*)" if one is None else "." if one == "" else _quoted(one) for one in middle)
    pattern = "".join(("(?s)", "" if starts else r"\A", body, "" if ends else r"\z"))
    check_pattern(pattern)
    return LikePattern(text, "regex", pattern)


def literal_runs(text: str) -> list[str]:
    """Return the runs of characters without wildcards that every match of a LIKE pattern has, in their order."""
    runs, taken = [""], iter(text)
    for character in taken:
        if character in "%_":
            runs.append("")
        else:
            runs[-1] += next(taken, "") if character == "\\" else character
    return [one for one in runs if one]


def like_mask(pattern: LikePattern, texts: StringArray) -> Mask:
    """Return where the texts match."""
    match pattern.how:
        case "equal":
            return texts.compare("==", pattern.literal)
        case "prefix":
            return texts.starts_with(pattern.literal)
        case "suffix":
            return texts.ends_with(pattern.literal)
        case "contains":
            return texts.contains(pattern.literal)
        case "any":
            return np.ones(len(texts), np.bool_)
        case "regex":
            return texts.matches(pattern.literal)


def regex_pattern(text: str) -> str:
    """Return the RE2 pattern with `.` matching newlines. Raises PatternInvalid with what is wrong."""
    _check_length(text)
    pattern = f"(?s){text}"
    try:
        check_pattern(pattern)
    except PatternInvalid as error:
        # RE2 says "Invalid regular expression: missing ]: [abc"; Milvus's own engine says "missing closing ]"
        said = re.sub(r"^Invalid regular expression: ", "", str(error))
        raise PatternInvalid(re.sub(r"^missing (?=[\])])", "missing closing ", said)) from None
    return pattern


def _check_length(text: str) -> None:
    if len(text) > PATTERN_CHARS_MAX:
        raise PatternInvalid(f"the pattern has {len(text)} characters, at most {PATTERN_CHARS_MAX} are read")


def _quoted(character: str) -> str:
    if character == "\0":
        return r"\x00"
    return character if character.isalnum() or ord(character) > 127 else f"\\{character}"
