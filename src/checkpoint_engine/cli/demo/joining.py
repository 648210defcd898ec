"""The demo's other course: an engine joins a pair that serves, and its weights come out of the memory of the pair's servers."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from checkpoint_engine.cli.demo.client import Asker
from checkpoint_engine.cli.demo.processes import Child
from checkpoint_engine.cli.demo.reference import Reference
from checkpoint_engine.cli.demo.run import gather, update_pair
from checkpoint_engine.cli.progress import line

JOINS = 10
"""The same engine, again and again: one join of a small model is over before a pair has answered often."""
BEFORE_SECONDS = 5.0
GOAL = 1.2
"""Times the 99th percentile of before."""


def join_course(
    client: httpx.Client,
    urls: Sequence[str],
    servers: list[Child],
    joiner: Child,
    real: Reference,
    scratch: Path,
    seconds: float,
    console: Console,
) -> dict[str, Any]:
    """urls: of the pair, and of the engine that joins. Returns what `show` prints of it; see `run` for `seconds`."""
    *pair, new = urls
    line(console, "updating the pair, which serves from then on")
    first = update_pair(servers, "real", seconds)
    metas = scratch / "metas.json"
    with ExitStack() as asking:
        askers = [asking.enter_context(Asker(url, real.kind, real.inputs)) for url in pair]
        time.sleep(BEFORE_SECONDS)
        cpu = _save(servers, metas, seconds)
        begin = time.monotonic()
        line(console, f"a third engine joins, {JOINS} times")
        reports = []
        for number in range(JOINS):
            joiner.send({"join": str(metas)})
            reports.append(gather([joiner], seconds + 10, "to join")[0]["report"])
            if number == 0:
                joined = real.check(client, new, "real")
        end = time.monotonic()
        cpu_joins = [after - before for before, after in zip(cpu, _save(servers, metas, seconds), strict=True)]
    before = [gap for asker in askers for gap in asker.between(begin - BEFORE_SECONDS, begin)]
    during = [gap for asker in askers for gap in asker.between(begin, end)]
    clients = [asker.summary({"real": real.answers}) for asker in askers]
    engines = [*(real.check(client, url, "real") for url in pair), joined]
    return {
        "updates": [{"version": "real", "registered": max(a["registered"] for a in first), "report": first[0]["report"]}],
        "joins": {
            "count": JOINS,
            "report": reports[0],
            "seconds": [report["seconds"] for report in reports],
            "source_cpu_seconds": cpu_joins,
            "cores": os.cpu_count(),
            "goal": GOAL,
            "before": latencies(before),
            "during": latencies(during),
        },
        "engines": engines,
        "clients": clients,
        "ok": all(e["parameters_equal"] and e["answers_equal"] and e["version_equal"] for e in engines)
        and all(c["answered"] and not c["failed"] and not c["mixed"] for c in clients),
    }


def _save(servers: list[Child], metas: Path, seconds: float) -> list[float]:
    """Have the metas written; processor seconds of each server so far."""
    for server in servers:
        server.send({"save": str(metas)})
    return [answer["cpu"] for answer in gather(servers, seconds, "to save the metas")]


def latencies(gaps: list[float]) -> dict[str, float]:
    """count, median and 99th percentile (seconds): the least that 99 of 100 answers did not exceed."""
    ordered = sorted(gaps)
    if not ordered:
        return {"count": 0, "median": 0.0, "p99": 0.0}
    return {"count": len(ordered), "median": ordered[len(ordered) // 2], "p99": ordered[math.ceil(0.99 * len(ordered)) - 1]}
