"""Tokens: what a client sends back means what it was given, and nothing else is taken for one."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.scope import ENTRIES_MAX, EVERY_SHARD, Scope, from_token, tick_of, to_token
from storage.errors import InvalidParameter
from storage.types import ShardId, Tick

TICKS = st.dictionaries(
    st.integers(0, 1023).map(ShardId), st.integers(0, (1 << 63) - 1).map(Tick), max_size=ENTRIES_MAX
)


@given(ticks=TICKS)
def test_a_token_comes_back_as_it_was(ticks: dict[ShardId, Tick]) -> None:
    """And is short text that a header and a URL may hold."""
    token = to_token(ticks)
    assert from_token(token, "token") == ticks
    assert re.fullmatch(r"[0-9a-z_-]*", token) and len(token) <= 22 * ENTRIES_MAX


def test_a_session_of_very_many_shards_stays_short_and_forgets_nothing() -> None:
    """Beyond the limit every shard must be as new as the newest of them, again and again."""
    ticks = {ShardId(i): Tick(1_000 + i) for i in range(ENTRIES_MAX + 1)}
    known = from_token(to_token(ticks), "token")
    assert known == {EVERY_SHARD: 1_000 + ENTRIES_MAX}
    assert all(tick_of(known, shard_id) >= tick for shard_id, tick in ticks.items())
    scope = Scope(0.0, seen=dict(known))
    scope.saw(ShardId(3), Tick(9_999))
    again = from_token(to_token(scope.seen), "token")
    assert tick_of(again, ShardId(3)) == 9_999
    assert tick_of(again, ShardId(4)) == 1_000 + ENTRIES_MAX


@pytest.mark.parametrize(
    "token",
    ["x", "1-", "-1", "1-2_", "1-2__3-4", "1-2 ", "fffff-1", "1-" + "f" * 17, "1-2_" * 400 + "1-2", "é-1", "every"],
)
def test_what_is_no_token_is_refused_by_name(token: str) -> None:
    """The message names the header."""
    with pytest.raises(InvalidParameter, match=r"Annulus-Session .* is no token of this server"):
        from_token(token, "Annulus-Session")
