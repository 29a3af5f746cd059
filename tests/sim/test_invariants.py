"""The table of invariants is complete, and its checks see what they are to see."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.sim.invariants import AT_EVERY_MOMENT, IN_EVERY_LOG, IN_THE_END

TESTS: Final = Path(__file__).resolve().parent.parent
IN_WORLDS: Final = """
I-CH-1 I-CH-2 I-CH-3 I-CH-4 I-CH-5 I-CH-6 I-CH-8
I-MS-3 I-MS-4 I-MS-6
I-CO-1 I-CO-2 I-CO-3 I-CO-6 I-CO-7 I-CO-8 I-CO-9
I-SH-1 I-SH-2 I-SH-3 I-SH-5 I-SH-6 I-SH-7 I-SH-8
I-CP-1 I-CP-2 I-CP-3
I-CT-1 I-CT-2 I-CT-3
""".split()
"""Invariants of the specification that a world can break."""
ELSEWHERE: Final = "I-CO-4 I-CO-5 I-CP-5 I-CP-6".split()
"""Those of the same chapters that other tests say they are about."""
NO_MATTER: Final = {
    "I-CH-7": "the control group is slot 0 for ever",
    "I-SH-4": "a segment that is full is sealed by a message, and what comes meanwhile goes into it",
    "I-SH-9": "there are no open transactions",
    "I-CP-4": "of two merges of a segment the second changes nothing, as I-CP-3 has it",
}
CHAPTERS: Final = {"I-CH": 8, "I-CO": 9, "I-SH": 9, "I-CP": 6, "I-CT": 3}
OF_NODES: Final = [
    "acknowledged writes",
    "snapshot counts",
    "filters",
    "full replication",
    "removed nodes",
    "who leads belongs",
]


def test_every_invariant_is_looked_after_by_name() -> None:
    """What the specification numbers is in one of the tables, or is said to be no matter of worlds; nothing else is."""
    names = [*IN_EVERY_LOG, *AT_EVERY_MOMENT, *IN_THE_END]
    assert {name.partition(" ")[0] for name in names if name.startswith("I-")} == set(IN_WORLDS)
    assert {name for name in names if not name.startswith("I-")} == set(OF_NODES)
    numbered = {f"{chapter}-{number + 1}" for chapter, count in CHAPTERS.items() for number in range(count)}
    looked_after = [*IN_WORLDS, *ELSEWHERE, *NO_MATTER]
    assert len(looked_after) == len(set(looked_after))
    assert numbered == {one for one in looked_after if not one.startswith("I-MS")}
    others = [path for path in TESTS.rglob("test_*.py") if path.parent != Path(__file__).parent]
    texts = [path.read_text(encoding="utf-8") for path in others]
    assert not [name for name in ELSEWHERE if not any(name in text for text in texts)]
