"""Cuts a failing plan down to fewer steps that still fail, so that a person can read what went wrong.

Chunks of steps are left out, large ones first (Zeller and Hildebrandt, "Simplifying and isolating failure-inducing
input", 2002). Any violation counts: the shortest story of a bug is often told by another check than the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.sim.plan import Plan, Step


def shrink(plan: Plan, fails: Callable[[Plan], bool], *, attempts_max: int = 200) -> Plan:
    """Return a plan with fewer steps that fails too, or the same if none was found.

    fails  whether a plan still fails; called at most `attempts_max` times
    """
    left = attempts_max

    def still_fails(steps: Sequence[Step]) -> bool:
        nonlocal left
        left -= 1
        return fails(plan.with_steps(steps))

    steps = list(plan.steps)
    # Whole parties first: a bug seldom needs all clients, the operator and every kind of fault.
    for party in sorted({_party(one) for one in steps}):
        rest = [one for one in steps if _party(one) != party]
        if left and len(rest) < len(steps) and still_fails(rest):
            steps = rest
    size = len(steps) // 2
    while size and left:
        begin = 0
        while begin < len(steps) and left:
            rest = steps[:begin] + steps[begin + size :]
            if still_fails(rest):
                steps = rest
            else:
                begin += size
        size = size // 2
    return plan.with_steps(steps)


def _party(step: Step) -> str:
    return f"fault {step.what}" if step.who == "fault" else step.who
