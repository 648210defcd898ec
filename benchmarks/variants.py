"""Ours alone under several settings, with the weights made and registered once: what each setting costs, or brings.

    torchrun --nproc-per-node N -m benchmarks.variants [--rounds 5] [--out FILE] [--traces FOLDER] MODEL [VARIANT ...]

The same model, loader and measure as side/side.py (a round is `gather_metas` + `update`, until the slowest rank's worker has
returned; parameters are zeroed before each), variant by variant in one process per rank, so that they can be compared. After
each variant every parameter is compared with what it must be. A line per variant: the median of its rounds (without those that
record and prove loads), how many times as fast as the first variant that is, device memory at most and after it, and what its
stages were busy with. A JSON record each goes to FILE, the last round's timeline to FOLDER, with what bounds it in a sentence.
Without a GPU it runs on the CPU, to rehearse.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from benchmarks.side.side import CUDA, GIB, TPModel, base_bytes, differing, free_bytes, named, nbytes, source, use, wait
from benchmarks.side.zoo import ZOO

RECORDED = {"CHECKPOINT_ENGINE_RECORDED_LOADS": "on"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """settings: of the servers. environment: of the workers; with recorded loads in it they name their model."""

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def warm_up(self) -> int:
        """Rounds before those that count."""
        return 3 if self.environment else 1


VARIANTS = {
    "plain": Variant({"verify": "off"}),
    "verify": Variant({"verify": "on"}),
    "no-timelines": Variant({"verify": "off", "timelines": False}),
    "broadcast": Variant({"verify": "off", "peer_copies": False, "map_regions": False, "method": "broadcast"}),
    "recorded": Variant({"verify": "off", "method": "broadcast"}, RECORDED),
    "recorded-verify": Variant({"verify": "on", "method": "broadcast"}, RECORDED),
    "pull": Variant({"verify": "off", "method": "pull"}, RECORDED),
    "pull-verify": Variant({"verify": "on", "method": "pull"}, RECORDED),
    "auto": Variant({"verify": "off"}, RECORDED),
}


def worker(rank: int, world: int, model: str, requests: Any, replies: Any) -> None:
    from checkpoint_engine.worker import update_weights_from_ipc

    device = use(rank)
    spec = ZOO[model]()
    shard = TPModel(spec, world, rank, device)
    module, key = named(shard), f"GPU-{torch.cuda.get_device_properties(rank).uuid!s}" if CUDA else ""
    wait()
    replies.put(None)
    while (asked := requests.get()) is not None:
        what, value = asked
        if what == "environment":
            for name in RECORDED:
                os.environ.pop(name, None)
            os.environ.update(value)
        elif what == "zero":
            for parameter in shard.p.values():
                parameter.zero_()
        elif what == "update":
            handle = dict(value)[key] if CUDA else value[rank][1]
            more = {"model": module} if os.environ.get("CHECKPOINT_ENGINE_RECORDED_LOADS") == "on" else {}
            update_weights_from_ipc(None, handle, device_id=rank, run=shard.load_weights, post_hook=None, **more)
        else:
            replies.put(differing(shard, spec, world, rank, device))
            continue
        wait()
        replies.put(None)


@contextlib.contextmanager
def lowest_free(rank: int) -> Iterator[list[int]]:
    """The least free device memory while the body runs, in bytes, looked at every 5 ms."""
    low, stop = [free_bytes()], threading.Event()

    def watch() -> None:
        use(rank)  # or this thread makes a context of its own on GPU 0, and counts it
        while not stop.wait(0.005):
            low[0] = min(low[0], free_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield low
    finally:
        stop.set()
        thread.join()


class Bench:
    """One rank: its server, its worker process, and the other ranks by way of the server's own store and links."""

    def __init__(self, model: str) -> None:
        from checkpoint_engine.ps import ParameterServer

        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        use(self.rank)
        spec, base = ZOO[model](), base_bytes()
        held, mine = [0] * self.world, {}
        for i, tensor in enumerate(spec):
            owner = held.index(min(held))
            held[owner] += nbytes(tensor)
            if owner == self.rank:
                mine[tensor[0]] = source(base, i, tensor)
        self.nbytes = sum(held)
        context = mp.get_context("spawn")
        self.requests, self.replies = context.Queue(), context.Queue()
        self.process = context.Process(target=worker, args=(self.rank, self.world, model, self.requests, self.replies))
        self.process.start()
        self.replies.get()
        self.free = free_bytes()
        self.ps = ParameterServer(auto_pg=True)
        self.ps.register_checkpoint("c", named_tensors=mine)

    def ask(self, what: str, value: Any = None) -> Any:
        self.requests.put((what, value))
        return self.replies.get()

    def slowest(self, number: float) -> float:
        """Of all ranks."""
        exchange = self.ps._fleet.links.exchange
        return max(float(text) for text in exchange("benchmark", repr(number).encode(), 300.0))

    def measure(self, variant: Variant, rounds: int) -> tuple[list[float], int, Any]:
        """Seconds of each round, of the slowest rank; bytes of device memory taken at most in rounds that count, compared with
        the moment before there was a server; the last one's report."""
        before = self.ps._settings
        self.ps._settings = before.replace(**variant.settings)
        self.ask("environment", dict(variant.environment))
        seconds, taken, report = [], 0, None
        try:
            for number in range(rounds + variant.warm_up):
                self.ask("zero")
                self.slowest(0.0)
                with lowest_free(self.rank) as low:
                    start = time.perf_counter()
                    self.ps.gather_metas("c")
                    report = self.ps.update("c", lambda handles: self.requests.put(("update", handles)))
                    self.replies.get()
                    mine = time.perf_counter() - start
                if number >= variant.warm_up:
                    taken = max(taken, self.free - low[0])
                seconds.append(self.slowest(mine))
        finally:
            self.ps._settings = before
        return seconds, taken, report

    def close(self) -> None:
        self.requests.put(None)
        self.process.join()


def tell(name: str, record: dict[str, Any], first: float, trace: Any, folder: Path | None) -> None:
    from checkpoint_engine.timeline import summarise, to_chrome

    stages = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in record["stages"].items())
    speed = f"{record['median_s']:8.4f} s {first / record['median_s']:6.2f} x {record['gb_per_s']:7.1f} GB/s"
    memory = f"+{record['extra_gpu_gib']:.2f} / +{record['held_gpu_gib']:.2f} GiB"
    right = f"WRONG {record['wrong']}" if record["wrong_on_any_rank"] else "verified"
    print(
        f"{record['model']} {name:<16}{speed}  {memory}  {record['method']}/{'+'.join(record['ways'])}  busy: {stages}  {right}",
        flush=True,
    )
    if folder is not None and trace.ranks:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{record['model']}-{name}.json").write_bytes(to_chrome(trace))
        print(f"    {summarise(trace).bound}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(ZOO))
    parser.add_argument("names", nargs="*", metavar="VARIANT", help=f"of {', '.join(VARIANTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--traces", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(VARIANTS):
        parser.error(f"no such variant: {', '.join(sorted(unknown))}")
    bench, first, wrong = Bench(arguments.model), 0.0, 0
    try:
        with bench.ps:
            for name in arguments.names or VARIANTS:
                variant = VARIANTS[name]
                seconds, taken, report = bench.measure(variant, arguments.rounds)
                names: Sequence[str] = bench.ask("compare")
                failed = bench.slowest(float(len(names)))
                median = statistics.median(seconds[variant.warm_up :])
                first, wrong = first or median, wrong + int(failed)
                record = {
                    "label": name, "model": arguments.model, "gpus": bench.world, "notes": list(report.notes),
                    "median_s": round(median, 4), "seconds": [round(s, 4) for s in seconds],
                    "gb_per_s": round(bench.nbytes / 1e9 / median, 1), "method": report.method, "ways": list(report.ways),
                    "extra_gpu_gib": round(taken / GIB, 2), "held_gpu_gib": round((bench.free - free_bytes()) / GIB, 2),
                    "stages": {k: round(s.seconds, 4) for k, s in report.stages.items()},
                    "verified": not failed, "wrong": list(names)[:5], "wrong_on_any_rank": int(failed),
                }  # fmt: skip
                if bench.rank == 0:
                    tell(name, record, first, report.trace, arguments.traces)
                    if arguments.out is not None:
                        with arguments.out.open("a") as file:
                            file.write(json.dumps(record) + "\n")
    finally:
        bench.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
