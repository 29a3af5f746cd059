"""Every error has its place in the table, and shows itself without giving anything away."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from node.api.faults import FAULTS, crash, refusal
from storage.errors import (
    BY_CODE,
    BadRow,
    CollectionNotFound,
    FilterError,
    OutcomeUnknown,
    Overloaded,
    RequestTimeout,
    error_from,
)


def test_every_error_has_a_code_of_its_own_kind() -> None:
    """The table covers the whole tree; an error made from its code and message is shown by its own line."""
    assert set(FAULTS) == set(BY_CODE.values())
    for code, kind in BY_CODE.items():
        shown = refusal(error_from(code, "a sentence"))
        assert shown.code == FAULTS[kind].code != 0
        assert shown.message.endswith("a sentence")


def test_a_new_error_is_shown_as_its_parent() -> None:
    """A class that the table does not know has its parent's line."""

    class Newer(BadRow):
        pass

    assert refusal(Newer("row 1")).code == 1804


@pytest.mark.parametrize(
    ("error", "plan", "message"),
    [
        (BadRow("row 1: x"), "", "fail to deal the insert data, error: row 1: x"),
        (BadRow("fail to deal the insert data, error: y"), "", "fail to deal the insert data, error: y"),
        (FilterError("cannot parse expression: z"), "query", "failed to create query plan: cannot parse expression: z"),
        (
            FilterError("cannot parse expression: z"),
            "delete",
            "failed to create delete plan: cannot parse expression: z",
        ),
        (FilterError("failed to create query plan: z"), "query", "failed to create query plan: z"),
        (CollectionNotFound("d", "c"), "query", "can't find collection[database=d][collection=c]"),
    ],
)
def test_the_words_in_front(error: BadRow | FilterError | CollectionNotFound, plan: str, message: str) -> None:
    """Outer words stand once in front of the error's own sentence."""
    assert refusal(error, plan=plan).message == message


def test_when_to_try_again() -> None:
    """Overload says when to try again; what timed out or lost its leader does not, since it may still be made."""
    assert refusal(Overloaded("busy")).headers == {"Retry-After": "1"}
    assert refusal(OutcomeUnknown("the leader was lost")).headers == {}
    assert refusal(RequestTimeout("request timeout")).headers == {}
    assert refusal(BadRow("x")).headers == {}


def test_a_crash_names_only_the_request() -> None:
    """The reply to a bug tells where to look."""
    shown = crash("id-7")
    assert (shown.status, shown.code) == (500, 65535)
    assert "id-7" in shown.message


def test_an_error_that_was_told_holds_nothing() -> None:
    """Whoever keeps a refused request's error does not keep the request, and no collector is needed to part them."""

    class Rows:
        """Stands for megabytes."""

    seen: list[weakref.ref[Rows]] = []

    async def write() -> None:
        rows = Rows()
        seen.append(weakref.ref(rows))
        try:
            raise ValueError("deep inside")
        except ValueError as error:
            raise Overloaded("too much") from error

    async def serve() -> None:
        task = asyncio.ensure_future(write())
        try:
            await asyncio.shield(task)
        except Overloaded as error:
            refusal(error)

    gc.disable()
    try:
        asyncio.run(serve())
        assert seen[0]() is None
    finally:
        gc.enable()
