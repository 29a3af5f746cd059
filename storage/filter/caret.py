"""From a complaint to the error a person reads: what is wrong, the line it is in, a caret below it, and help."""

from __future__ import annotations

from typing import Final

from storage.errors import FilterError
from storage.filter.syntax import Complaint

TEXT_SHOWN_CHARS: Final = 200
LINE_SHOWN_CHARS: Final = 100


def filter_error(text: str, complaint: Complaint) -> FilterError:
    """Return the error for a complaint about this text.

    cannot parse expression: color = "red", error: unexpected '='; comparison is written `==`
        color = "red"
              ^
    """
    shown = text if len(text) <= TEXT_SHOWN_CHARS else f"{text[:TEXT_SHOWN_CHARS]}..."
    help_text = f"; {complaint.hint}" if complaint.hint else ""
    message = f"cannot parse expression: {shown}, error: {complaint.message}{help_text}"
    return FilterError(f"{message}\n{_pointed(text, complaint)}")


def _pointed(text: str, complaint: Complaint) -> str:
    start, stop = complaint.at
    start = min(start, len(text))
    first = text.rfind("\n", 0, start) + 1
    end = text.find("\n", first)
    line = text[first : len(text) if end < 0 else end]
    column, width = start - first, max(1, min(stop, first + len(line)) - start)
    left = max(0, column - LINE_SHOWN_CHARS // 2)
    right = left + LINE_SHOWN_CHARS
    before, after = "..." if left else "", "..." if right < len(line) else ""
    shown = "".join(" " if one.isspace() else one for one in line[left:right])
    marks = "^" * min(width, right - column)
    return f"    {before}{shown}{after}\n    {' ' * (len(before) + column - left)}{marks}"
