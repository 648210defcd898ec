"""`python -m benchmarks`: one run that compares an update, its set-up and registering with what this machine can do.

    python -m benchmarks [--gib 1] [--layers 40] [--rounds 7] [--register-rounds 5] [--json]

What each row measures is told at the head of benchmarks/broadcast.py and benchmarks/registering.py. Medians of rounds that
were run in turn; a ratio is the median of the rounds' ratios. Use the ratios: GB/s are this machine's at this moment.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from benchmarks import broadcast, registering

from checkpoint_engine.settings import MIB, Settings

GIB = 1 << 30


class Goal(NamedTuple):
    """A figure that ought to be at least, or at most, `bound`."""

    what: str
    value: float
    bound: float
    unit: str
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "met" if self.met else "MISSED"
        return f"{self.what:66}{self.value:8.2f}{self.unit}  goal {sign} {self.bound:g}{self.unit}  {verdict}"


def updating(result: broadcast.Result) -> list[Goal]:
    goals = []
    for method in broadcast.METHODS:
        further = f"{method}, further"
        goals.append(Goal(f"{method} / raw gloo broadcast, the better of both", result.ratio(further), 0.7, "x"))
        one_each = result.ratio(further, "raw, tensors")
        goals.append(Goal(f"{method} / raw gloo broadcast, one call per tensor", one_each, 0.7, "x"))
        unchecked = result.ratio(f"{method}, unchecked")
        goals.append(Goal(f"{method}, digests not checked / raw gloo broadcast, the better", unchecked, 0.7, "x"))
    for method in broadcast.METHODS:
        milliseconds = 1000 * result.median(f"{method}, tiny")
        goals.append(Goal(f"{method}: set-up, a further update of 4 KiB", milliseconds, 50, " ms", at_least=False))
    return goals


def registering_goals(rows: dict[str, dict[str, float]]) -> list[Goal]:
    """The copy makes no digests of tensors; ours is shown with them too where that is the more, into new memory."""
    return [
        Goal(f"registering, {name} / mmap + 32-thread copy", rows[name]["median_ratio"], 1.0, "x")
        for name in ("fresh: ours", "fresh: ours, digests", "again: ours")
    ]


def show_updates(result: broadcast.Result) -> None:
    print(
        f"{result.nbytes / 1e9:.3f} GB in {result.tensors} tensors, {broadcast.RANKS} ranks, median of {len(result.raw)} rounds"
    )
    print(f"{'':24}{'seconds':>9}{'GB/s':>8}{'CPU s':>8}")
    ours = [f"{method}, {variant}" for method in broadcast.METHODS for variant in ("first", "further", "unchecked")]
    for variant in (*broadcast.RAW, *ours):
        seconds, cpu = result.median(variant), statistics.median(result.cpu[variant])
        print(f"{variant:24}{seconds:9.3f}{result.nbytes / seconds / 1e9:8.2f}{cpu:8.2f}")
    for variant in (f"{method}, tiny" for method in broadcast.METHODS):
        print(f"{variant:24}{result.median(variant):9.4f}{'':8}{statistics.median(result.cpu[variant]):8.3f}")
    for method in broadcast.METHODS:
        print(f"{method}: a further update takes {result.cost(method):.2f} times as long as without checking digests")
    print(f"{'memcpy, one thread':24}{result.nbytes / result.memcpy:9.3f}{result.memcpy / 1e9:8.2f}")
    for method, stages in result.stages.items():
        busy = ", ".join(f"{stage} {statistics.median(values):.3f} s" for stage, values in stages.items())
        print(f"{method}, at work in a further update, on the busiest rank: {busy}")


def show_registering(rows: dict[str, dict[str, float]], nbytes: int) -> None:
    print(f"\nregistering {nbytes / 1e9:.2f} GB of cached files")
    print(f"{'':24}{'GB/s':>8}{'against mmap':>14}{'CPU s/GB':>10}")
    for name, row in rows.items():
        print(f"{name:24}{row['median_gb_s']:8.2f}{row['median_ratio']:13.2f}x{row['cpu_s_per_gb']:10.3f}")


def run_registering(gib: float, rounds: int, directory: str | None) -> tuple[dict[str, dict[str, float]], int]:
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        paths = registering.write_files(Path(folder), gib, 2, 16.0)
        nbytes = sum(path.stat().st_size for path in paths)
        return registering.summarise(registering.measure(paths, rounds, Settings().io_threads), nbytes), nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="bytes of the checkpoint, GiB")
    parser.add_argument("--layers", type=int, default=40, help="of the checkpoint")
    parser.add_argument("--rounds", type=int, default=7, help="of updates")
    parser.add_argument("--register-rounds", type=int, default=5, help="of registering; 0: leave it out")
    parser.add_argument("--bucket-mib", type=float, help="default: what the package chooses")
    parser.add_argument("--ring-mib", type=float, help="default: what the package chooses")
    parser.add_argument("--dir", help="where to put the files to register; not /dev/shm")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sizes = {"bucket_bytes": arguments.bucket_mib, "ring_bytes": arguments.ring_mib}
    changes = {name: int(mib * MIB) for name, mib in sizes.items() if mib}
    result = broadcast.measure(nbytes=int(arguments.gib * GIB), layers=arguments.layers, rounds=arguments.rounds, **changes)
    goals = updating(result)
    rows: dict[str, dict[str, float]] = {}
    if not arguments.json:
        print(f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}\n")
        show_updates(result)
    if arguments.register_rounds:
        rows, nbytes = run_registering(arguments.gib, arguments.register_rounds, arguments.dir)
        goals += registering_goals(rows)
        if not arguments.json:
            show_registering(rows, nbytes)
    if arguments.json:
        told = {
            "updates": dataclasses.asdict(result),
            "registering": rows,
            "goals": [{**g._asdict(), "met": g.met} for g in goals],
        }
        print(json.dumps(told, indent=2))
    else:
        print("\n" + "\n".join(map(str, goals)))


if __name__ == "__main__":
    main()
