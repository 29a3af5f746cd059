"""The one check: its order, when it stops, and what it says at the end."""

from __future__ import annotations

from tools.check import MACHINE_TESTS, Step, run, steps, summary

PASSES = Step("passes", ("this", "--version"))
FAILS = Step("fails", ("no_such_module_here",))


def test_order() -> None:
    """Format, lint, types, tests; --fix mends instead of only looking."""
    assert [step.name for step in steps()] == ["format", "lint", "types", "tests", "machine"]
    assert "--check" in steps()[0].command
    assert "--check" not in steps(fix=True)[0].command
    assert "--fix" in steps(fix=True)[1].command
    assert all("--slow" in step.command for step in steps(slow=True)[3:])
    assert all(f"--ignore={one}" in steps()[3].command and one in steps()[4].command for one in MACHINE_TESTS)


def test_it_stops_at_the_first_failure_unless_told() -> None:
    """What was not run is said to be not run, never ok."""
    wanted = [FAILS, PASSES]
    outcomes = run(wanted, all_steps=False)
    assert [outcome.passed for outcome in outcomes] == [False]
    assert "FAILED" in summary(wanted, outcomes).splitlines()[0]
    assert "not run" in summary(wanted, outcomes).splitlines()[1]
    outcomes = run(wanted, all_steps=True)
    assert [outcome.passed for outcome in outcomes] == [False, True]
