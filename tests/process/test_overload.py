"""A node with little memory under a flood: real processes, real sockets, real memory."""

from __future__ import annotations

from pathlib import Path

from tools.bench.node import NodeProcess, free_address
from tools.bench.overload import AFTER, environment, run

LIMIT_BYTES = 448 << 20
MARGIN_BYTES = 96 << 20
"""What threads, allocators and LevelDB take between two looks."""


def test_a_flood_is_slowed_and_refused_and_nobody_else_notices(tmp_path: Path) -> None:
    """Ten clients insert megabytes into one collection as fast as they can; another tenant's inserts and searches are
    all answered, memory stays within its limit, the flood is told to come again and when, after its end everything is
    accepted again, and after a kill -9 every acknowledged row is there."""
    given = {
        **environment(str(LIMIT_BYTES)),
        "ANNULUS_ADMISSION_WAIT_S_MAX": "0.5",
        "ANNULUS_ADMISSION_STANDING_WAIT_S_MAX": "0.3",
    }
    log = tmp_path / "log"
    with NodeProcess(str(tmp_path / "data"), free_address(), log_path=str(log), environment=given) as node:
        node.start()
        seen = run(node, LIMIT_BYTES, seconds=12, clients=10)
    assert set(seen.quiet.codes) == set(seen.beside.codes) == {0}, seen.beside.messages
    assert seen.beside.codes[0] > 20
    assert set(seen.flood.codes) <= {0, 4, 9} and seen.flood.codes[0] and seen.flood.codes[4] + seen.flood.codes[9]
    assert seen.flood.without_retry_after == 0
    for message in seen.flood.messages.values():
        assert "flood" in message and "raises it" in message
    assert seen.after.codes[0] == AFTER
    assert seen.rss_bytes_max <= LIMIT_BYTES + MARGIN_BYTES
    assert seen.flood_rows == seen.flood.acknowledged + seen.after.acknowledged
    assert seen.good_rows == seen.quiet.acknowledged + seen.beside.acknowledged
