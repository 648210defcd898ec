"""The demo's results for people: tables on a terminal, aligned lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from checkpoint_engine.cli.progress import line, size, speed, table

_STAGES = ["stage", "bytes", "seconds", "speed"]


def show(result: dict[str, Any], console: Console) -> None:
    line(console, f"{result['checkpoint']}: {result['tensors']} tensors, {size(result['nbytes'])}")
    for update in result["updates"]:
        _show_stages(update, console)
    if result["method"] == "p2p":
        _show_joins(result["joins"], console)
    else:
        _show_answers(result, console)
    _show_clients(result, console)
    _show_equality(result, console)
    line(console, "all equal, no request failed" if result["ok"] else "NOT as it should be: see above")


def _show_stages(update: dict[str, Any], console: Console) -> None:
    report = update["report"]
    done = [("register", report["nbytes"], update["registered"])]
    done += [(name, stage["nbytes"], stage["seconds"]) for name, stage in report["stages"].items()]
    done.append(("whole update", report["nbytes"], report["seconds"]))
    rows = [_row(*each) for each in done]
    table(console, f"Update to {update['version']}", _STAGES, rows, numbers=3)


def _row(name: str, nbytes: int, seconds: float) -> list[str]:
    return [name, size(nbytes), f"{seconds:.3f} s", speed(nbytes, seconds)]


def _show_joins(joins: dict[str, Any], console: Console) -> None:
    report, before, during = joins["report"], joins["before"], joins["during"]
    rows = [_row(name, stage["nbytes"], stage["seconds"]) for name, stage in report["stages"].items()]
    rows.append(_row("whole join", report["nbytes"], report["seconds"]))
    table(console, f"First join, by {report['method']}", _STAGES, rows, numbers=3)
    rows = [
        [name, str(found["count"]), f"{found['median'] * 1e3:.1f} ms", f"{found['p99'] * 1e3:.1f} ms"]
        for name, found in (("before", before), (f"during {joins['count']} joins", during))
    ]
    table(console, "Answers of the pair", ["", "answers", "median", "99th percentile"], rows, numbers=3)
    ratio = during["p99"] / before["p99"] if before["p99"] else 0.0
    about = f"goal: {joins['goal']}; {joins['cores']} cores for all of this"
    line(console, f"99th percentile during against before: {ratio:.2f} ({about})")
    cpu = ", ".join(f"{seconds:.2f} s" for seconds in joins["source_cpu_seconds"])
    line(console, f"processor time of the pair's servers for {joins['count']} joins: {cpu}")


def _show_answers(result: dict[str, Any], console: Console) -> None:
    columns = ["before", *(u["version"] for u in result["updates"])]
    shown = [result["before"][0], *(u["engines"][0]["shown"] for u in result["updates"])]
    rows = [[label, *(_value(s[i]) for s in shown)] for i, label in enumerate(result["questions"])]
    what = "Similarity of sentences" if result["kind"] == "embed" else "Generated"
    table(console, f"{what} (engine 0)", ["question", *columns], rows, numbers=len(columns) if result["kind"] == "embed" else 0)


def _value(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _show_clients(result: dict[str, Any], console: Console) -> None:
    rows = [
        [
            str(i), str(c["answered"]), str(c["failed"]), str(len(c["mixed"])),
            f"{c['median_gap'] * 1e3:.0f} ms", f"{c['longest_gap'] * 1e3:.0f} ms",
        ]
        for i, c in enumerate(result["clients"])
    ]  # fmt: skip
    columns = ["engine", "answered", "failed", "on mixed weights", "usual gap", "longest gap"]
    table(console, "Requests during all this", columns, rows, numbers=5)
    for i, client in enumerate(result["clients"]):
        for failure in client["failures"]:
            line(console, f"  engine {i}: {failure}")


def _show_equality(result: dict[str, Any], console: Console) -> None:
    rows = [
        [
            str(i), update["version"],
            f"all {e['parameters']} equal" if e["parameters_equal"] else f"{len(e['different'])} differ: {e['different'][0]} ...",
            "equal" if e["answers_equal"] else "DIFFERENT",
            "equal" if e["version_equal"] else "DIFFERENT",
        ]
        for update in result["updates"]
        for i, e in enumerate(update.get("engines", result.get("engines", ())))
    ]  # fmt: skip
    columns = ["engine", "update", "parameters, bit for bit", "answers, exactly", "version"]
    table(console, "Engines against transformers with the same checkpoint", columns, rows, numbers=0)
