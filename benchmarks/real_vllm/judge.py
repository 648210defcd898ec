"""What of a live server's steps is as it should be. Pure: what was seen in, a row out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

State = Mapping[str, Any]
HEADINGS = (
    "model", "tp", "layers", "replayed", "ready s", "update s", "load_weights s", "pause s", "staged MiB", "tokens", "digests",
    "moved", "bad refused", "in flight",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table, and what is wrong with it (nothing: it passed)."""

    cells: tuple[str, ...]
    wrong: tuple[str, ...]


def judge(name: str, tp: int, ready: float, steps: Sequence[Mapping[str, Any]], expected: Mapping[str, State]) -> Row:
    """steps: what `updates` wrote, each with "checkpoint", the key of `expected` that it must lead to, or with "bad", the tensor
    that its error must name. The first is the state before any update."""
    wrong: list[str] = []
    start, steps = steps[0], steps[1:]
    good = [step for step in steps if not step.get("bad")]
    tokens, digests, moved = 0, 0, 0
    if expected["A"]["answers"] == expected["B"]["answers"]:
        wrong.append("both checkpoints have the same answers: nothing is shown")
    if start["answers"] in [one["answers"] for one in expected.values()]:
        wrong.append("the answers were right before any update: nothing is shown")
    for step in good:
        label = f"{step['version']} ({step['by']})"
        if "error" in step:
            wrong.append(f"{label}: {step['error']}")
            continue
        if any(status["dirty"] or status["version"] != step["version"] for status in step["status"]):
            wrong.append(f"{label}: status {step['status']}")
        target = expected[step["checkpoint"]]
        same = step["answers"] == target["answers"]
        differing = _differing(step, target)
        changed = _moved(start, step)
        tokens, digests, moved = tokens + same, digests + (not differing), moved + len(changed)
        if not same:
            wrong.append(f"{label}: tokens {step['answers']} instead of {target['answers']}")
        if differing:
            wrong.append(f"{label}: {len(differing)} parameters differ, first {differing[:3]}")
        if changed:
            wrong.append(f"{label}: {len(changed)} parameters moved, first {changed[:3]}")
    refused = [_refused(step) for step in steps if step.get("bad")]
    wrong += [problem for problem in refused if problem]
    answered = sum(step.get("answered", 0) for step in steps)
    failed = [failure for step in steps for failure in step.get("failed", ())]
    wrong += [f"a request in flight failed: {failure}" for failure in failed[:3]]
    if not answered:
        wrong.append("no request was in flight")
    cells: tuple[str, ...] = (
        name,
        str(tp),
        _layers(good),
        _replayed(good),
        f"{ready:.0f}",
        *_times(good),
        f"{tokens}/{len(good)}",
        f"{digests}/{len(good)}",
    )
    cells += (str(moved), f"{refused.count('')}/{len(refused)}", f"{answered} ok, {len(failed)} failed")
    return Row(cells, tuple(wrong))


def _differing(step: State, target: State) -> list[str]:
    """ "rank: name" of parameters whose digests are not the same, or that only one side has."""
    found = []
    for rank, (mine, theirs) in enumerate(zip(step["parameters"], target["parameters"], strict=True)):
        for name in sorted({*mine, *theirs}):
            if name not in mine or name not in theirs or mine[name][0] != theirs[name][0]:
                found.append(f"{rank}: {name}")
    return found


def _moved(start: State, step: State) -> list[str]:
    """Parameters whose memory is not where it was: CUDA graphs would go on reading the old one."""
    found = []
    for rank, (before, now) in enumerate(zip(start["parameters"], step["parameters"], strict=True)):
        found += [f"{rank}: {name}" for name in before if name not in now or before[name][1] != now[name][1]]
    return found


def _refused(step: Mapping[str, Any]) -> str:
    """What is wrong with how a bad checkpoint was refused; nothing: empty."""
    if "error" not in step:
        return f"{step['version']}: the bad checkpoint was taken"
    if step["bad"] not in step["error"]:
        return f"{step['version']}: the error does not name {step['bad']}: {step['error']}"
    if not any(status["dirty"] for status in step["status"]):
        return f"{step['version']}: no worker is dirty: {step['status']}"
    ranks = [status["rank"] for status in step["status"]]
    return "" if ranks == sorted(ranks) else f"{step['version']}: answers of ranks {ranks}"


def _layers(good: Sequence[Mapping[str, Any]]) -> str:
    ways: Mapping[str, int] = next((s["layers"] for step in good for s in step.get("status", ()) if "layers" in s), {})
    return " ".join(f"{count} {way}" for way, count in sorted(ways.items())) or "-"


def _replayed(good: Sequence[Mapping[str, Any]]) -> str:
    """Of the updates that reported, how many made copies by load plans on all workers."""
    ways = [step["report"]["ways"] for step in good if "report" in step]
    return f"{sum(list(way) == ['replayed'] for way in ways)}/{len(ways)}"


def _times(good: Sequence[Mapping[str, Any]]) -> tuple[str, str, str, str]:
    """Medians of update, load_weights and pause, and the most that staged layers held, MiB."""
    reports = [step["report"] for step in good if "report" in step]
    if not reports:
        return "-", "-", "-", "-"
    loads = [report["stages"].get("load_weights", {"seconds": 0.0})["seconds"] for report in reports]
    pauses = [report["pause_ms"] / 1000 for report in reports if report.get("pause_ms") is not None]
    peak = max(status.get("staged_peak_bytes", 0) for step in good for status in step["status"])
    seconds = [median(report["seconds"] for report in reports), median(loads), median(pauses or [0.0])]
    first, second, third = (f"{one:.3f}" for one in seconds)
    return first, second, third, f"{peak / 2**20:.1f}"


def table(rows: Sequence[Row]) -> str:
    """Aligned lines, then what is wrong."""
    lines = [HEADINGS, *(row.cells for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += [f"WRONG {row.cells[0]} tp={row.cells[1]} {problem[:600]}" for row in rows for problem in row.wrong]
    return "\n".join(text)
