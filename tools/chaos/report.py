"""A run as one HTML page that loads nothing: the verdict, a picture of what happened when, and the figures."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tools.bench.report import machine
from tools.chaos.faults import FAULTS
from tools.chaos.figures import gaps, percentile, rates, repeats
from tools.chaos.fleet import Kind, Outcome, Request
from tools.chaos.run import Record
from tools.crash.model import Violation

BINS_MAX = 600
BIN_S_MIN = 0.5
WIDTH, LEFT, RATE_HEIGHT, LANE_HEIGHT = 1100, 130, 90, 16
COLOURS = ("#3b6fb6", "#d1793a", "#4c9a62", "#8a5fae", "#b34a5d", "#5f9ea0", "#8c8c3c")
OK_COLOUR, BAD_COLOUR, FAULT_COLOUR, CALM_COLOUR = "#7fae8a", "#c8453c", "#5b5b6b", "#e9edf3"
PANELS: Mapping[str, Sequence[Kind]] = {
    "writes": (Kind.WRITE,),
    "strong reads": (Kind.STRONG,),
    "weaker reads": (Kind.RELAXED,),
}
OFTEN = 6
STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1240px; padding: 0 1em; color: #1c1c22 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .15em .8em .15em 0; text-align: right }
td:first-child, th:first-child { text-align: left } th { font-weight: 600; border-bottom: 1px solid #ccc }
.good { color: #2c7a44 } .bad { color: #b3261e } pre { white-space: pre-wrap; background: #f6f6f8; padding: 1em }
svg text { font: 11px system-ui, sans-serif; fill: #444 }
"""


def page(
    *,
    command: str,
    record: Record,
    ended_s: float,
    requests: Sequence[Request],
    leaders: Sequence[tuple[float, int, str]],
    names: Sequence[str],
    violations: Sequence[Violation],
    facts: Mapping[str, Any],
) -> str:
    """Return the page. `facts` are figures of a line each; times are of `time.monotonic`."""
    verdict = "every promise kept" if not violations else f"{len(violations)} promises broken"
    parts = [
        f"<h1>Chaos: <span class={'bad' if violations else 'good'}>{verdict}</span></h1>",
        f"<p><code>{html.escape(command)}</code></p>",
        _table(["", ""], [[key, str(value)] for key, value in {**facts, **machine()}.items()]),
    ]
    if violations:
        parts.append("<h2>Broken promises</h2><pre>" + html.escape("\n".join(map(str, violations[:50]))) + "</pre>")
    parts += [
        "<h2>What happened when</h2>",
        timeline(record, ended_s=ended_s, requests=requests, leaders=leaders, names=names),
        "<h2>Longest times without an answer, in seconds</h2>",
        "<p>From each fault's beginning to 5 s after its end, as clients saw it that go to any node and wait for an"
        " answer up to 5 s. Some faults take the majority away; then nothing can be answered until they end.</p>",
        _gap_table(requests, record),
        "<h2>How often a request was sent</h2>",
        _repeat_table(requests),
        "<h2>Faults of this run</h2>",
        _table(
            ["fault", "what it does"],
            [[name, FAULTS[name].sentence] for name in sorted({one.name for one in record.happenings})]
            + [[name, f"left out: {why}"] for name, why in record.skipped.items()],
        ),
    ]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>Chaos: {verdict}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}<body>{body}</body></html>\n'


def timeline(
    record: Record,
    *,
    ended_s: float,
    requests: Sequence[Request],
    leaders: Sequence[tuple[float, int, str]],
    names: Sequence[str],
) -> str:
    """Return an SVG: answered and failed requests a second, faults as bars, and who led which shard."""
    began_s = record.began_s
    whole_s = max(ended_s - began_s, BIN_S_MIN)
    bin_s = max(BIN_S_MIN, whole_s / BINS_MAX)
    scale = (WIDTH - LEFT) / whole_s

    def x(at_s: float) -> float:
        return LEFT + (min(max(at_s, began_s), ended_s) - began_s) * scale

    lanes: list[str] = []
    top = 10.0
    for label, kinds in PANELS.items():
        counted = rates(requests, kinds, began_s=began_s, bin_s=bin_s, bins=int(whole_s / bin_s) + 1)
        lanes.append(_rate_lane(label, counted, top=top, bin_s=bin_s, width=bin_s * scale))
        top += RATE_HEIGHT + 14
    for name in sorted({one.name for one in record.happenings}):
        lanes.append(_text(name, top))
        for one in record.happenings:
            if one.name == name:
                title = f"{name}: {one.note}, {one.began_s - began_s:.1f} s to {one.ended_s - began_s:.1f} s"
                lanes.append(_bar(x(one.began_s), x(one.ended_s), top, FAULT_COLOUR, title))
        top += LANE_HEIGHT
    top += 10
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    for shard in sorted({shard for _, shard, _ in leaders}):
        mine = [(at_s, leader) for at_s, which, leader in leaders if which == shard]
        lanes.append(_text(f"leader of {shard}", top))
        for (at_s, leader), (until_s, _) in zip(mine, [*mine[1:], (ended_s, "")], strict=True):
            lanes.append(_bar(x(at_s), x(until_s), top, colours.get(leader, "#999"), f"shard {shard}: {leader}"))
        top += LANE_HEIGHT
    for i, name in enumerate(names):
        lanes.append(f'<rect x="{LEFT + 70 * i}" y="{top + 6}" width="10" height="10" fill="{colours[name]}"/>')
        lanes.append(f'<text x="{LEFT + 70 * i + 14}" y="{top + 15}">{html.escape(name)}</text>')
    lanes += [_moment(x(began_s + second), top, second) for second in range(0, int(whole_s) + 1, _step_s(whole_s))]
    calm = [_calm(x(begun_s), x(until_s), top) for begun_s, until_s in record.calm]
    picture = f'<svg viewBox="0 0 {WIDTH + 20} {top + 44:.0f}" role="img">{"".join(calm)}{"".join(lanes)}</svg>'
    return picture + "<p>Green: answered. Red: failed. On grey ground clients wait while every node is verified.</p>"


def summary(requests: Sequence[Request], record: Record) -> dict[str, Any]:
    """Return the figures that stand on the terminal too."""
    found: dict[str, Any] = {"rounds": record.rounds, "faults": len(record.happenings)}
    for kind in Kind:
        mine = [one for one in requests if one.kind is kind]
        if mine:
            failed = sum(one.outcome is not Outcome.OK for one in mine)
            took_ms = [1000 * (one.ended_s - one.began_s) for one in mine if one.outcome is Outcome.OK]
            times = f"p50 {percentile(took_ms, 0.5):.0f} ms, p99 {percentile(took_ms, 0.99):.0f} ms"
            found[f"requests: {kind}"] = f"{len(mine)}, {failed} without an answer, {times}"
    return found


def _gap_table(requests: Sequence[Request], record: Record) -> str:
    kinds = (Kind.WRITE, Kind.STRONG, Kind.RELAXED)
    rows = []
    for one in gaps(requests, record):
        cells = [f"{percentile(one.longest_s[kind], share):.2f}" for kind in kinds for share in (0.5, 0.99, 1.0)]
        rows.append([one.fault, str(one.times), *cells])
    headings = [f"{kind} {share}" for kind in ("write", "strong", "weaker") for share in ("p50", "p99", "max")]
    return _table(["fault", "times", *headings], rows)


def _repeat_table(requests: Sequence[Request]) -> str:
    counted = {kind: repeats(requests, kind) for kind in Kind}
    rows = [
        [str(kind), *(str(one.get(attempts, 0)) for attempts in range(1, OFTEN)),
         str(sum(count for attempts, count in one.items() if attempts >= OFTEN))]
        for kind, one in counted.items() if one
    ]  # fmt: skip
    return _table(["request", *(f"{attempts}x" for attempts in range(1, OFTEN)), f"{OFTEN}x and more"], rows)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(one)}</th>" for one in headings) if any(headings) else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>" if head else f"<table>{body}</table>"


def _rate_lane(label: str, counted: Sequence[tuple[int, int]], *, top: float, bin_s: float, width: float) -> str:
    most = max((answered + failed for answered, failed in counted), default=0) or 1
    parts = [_text(label, top), f'<text x="{LEFT - 6}" y="{top + 26}" text-anchor="end">{most / bin_s:.0f}/s</text>']
    for i, (answered, failed) in enumerate(counted):
        low, high = RATE_HEIGHT * answered / most, RATE_HEIGHT * failed / most
        at, bottom = LEFT + i * width, top + RATE_HEIGHT
        if answered:
            parts.append(_block(at, bottom - low, width, low, OK_COLOUR))
        if failed:
            parts.append(_block(at, bottom - low - high, width, high, BAD_COLOUR))
    return "".join(parts)


def _block(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" fill="{colour}"/>'


def _bar(left: float, right: float, top: float, colour: str, title: str) -> str:
    shape = f'x="{left:.1f}" y="{top + 2:.1f}" width="{max(right - left, 1.5):.1f}" height="{LANE_HEIGHT - 4}"'
    return f'<rect {shape} fill="{colour}"><title>{html.escape(title)}</title></rect>'


def _calm(left: float, right: float, bottom: float) -> str:
    return f'<rect x="{left:.1f}" y="0" width="{right - left:.1f}" height="{bottom:.1f}" fill="{CALM_COLOUR}"/>'


def _text(label: str, top: float) -> str:
    return f'<text x="{LEFT - 6}" y="{top + 12:.1f}" text-anchor="end">{html.escape(label)}</text>'


def _moment(x: float, top: float, second: int) -> str:
    return f'<text x="{x:.1f}" y="{top + 34:.1f}" text-anchor="middle">{second} s</text>'


def _step_s(whole_s: float) -> int:
    return next(step for step in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 10**9) if whole_s / step <= 14)
