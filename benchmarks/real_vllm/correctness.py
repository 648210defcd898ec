"""Do updates leave in real vLLM servers what these would have loaded themselves? Prints a table; status 0: everything is equal.

For every kind of model and TP size three servers: one loads checkpoint A itself, one B, and one starts from dummy weights and is
updated A, B, A, then with spoiled ones (refused), B, A, and by the command line B. Greedy tokens of single prompts and a digest
of every parameter must be the same. With --recorded a fourth is updated in the same way whose loads are recorded and replayed.
Servers share the GPUs and run side by side, as many as `--servers` says.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from real_vllm.judge import HEADINGS, Row, judge, table
from real_vllm.models import SHAPES, TINY, TINY_EXPERTS, random_tensors, save, spoil
from real_vllm.server import ROOT, Host, Processes, Server, ServerDiedError, last_error, rpc, say, serve, state, torchrun

KINDS = ("dense-bf16", "moe-bf16", "dense-fp8", "moe-fp8")
# Checkpoint, how it is sent, whether requests are in flight meanwhile. bad: B with a projection of attention that is too narrow,
# bad-expert: the same of an expert, for which vLLM's own loader allows it, to leave room for padding.
STEPS = (("A", "roll_out", True), ("B", "push", True), ("A", "update", True), ("bad", "roll_out", False),
         ("B", "roll_out", False), ("bad-expert", "roll_out", False), ("A", "push", False), ("B", "cli", False))  # fmt: skip
SHARED_GPU = ("--gpu-memory-utilization", "0.04", "--kv-cache-memory-bytes", str(512 << 20))
GRAPHS = '{"mode":0,"cudagraph_mode":"FULL_DECODE_ONLY"}'
"""CUDA graphs without inductor: a server starts in half the time."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for table.txt, results.json and logs.tgz")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of " + ", ".join(SHAPES))
    parser.add_argument("--tp", default="1,2", help="tensor-parallel sizes")
    parser.add_argument("--gpus", type=int, default=2, help="of this host; 0: vLLM's build for CPUs, tiny models")
    parser.add_argument("--servers", type=int, default=12, help="at once")
    parser.add_argument("--recorded", action="store_true", help="one more server of each, with recorded loads")
    parser.add_argument("--seconds", type=float, default=520.0, help="for all of it; what is not done then is missing")
    parser.add_argument("--compilation", choices=("graphs", "default"), default="graphs", help="default: with inductor")
    parser.add_argument("--python", default=sys.executable, help="interpreter with vLLM")
    parser.add_argument("--ranks-python", default=sys.executable, help="interpreter for the parameter servers")
    parser.add_argument("--known", type=Path, help="folder of vLLM's model descriptions, copied to each server's cache")
    return parser.parse_args()


class Run:
    """All servers of one run of this script."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.processes = options, work, Processes()
        known = options.known.resolve() if options.known else None
        self.host = Host(options.python, options.ranks_python, ROOT / "src", work, known, options.gpus)
        self.bad: dict[tuple[str, str], str] = {}
        self._turn = 0

    def make(self, kind: str) -> None:
        """The checkpoints of a kind: A, B and the bad ones."""
        shape = SHAPES[kind]
        if not self.options.gpus:
            shape = TINY_EXPERTS if shape.experts else TINY
        for seed, letter in enumerate("AB"):
            weights = random_tensors(shape, seed, "cuda" if self.options.gpus else "cpu")
            save(self.work / kind / letter, shape, weights)
        for letter in ("bad", "bad-expert") if shape.experts else ("bad",):
            spoilt, self.bad[kind, letter] = spoil(weights, shape, expert=letter != "bad")
            save(self.work / kind / letter, shape, spoilt)

    def steps(self, kind: str) -> list[tuple[str, str, bool]]:
        """Those of STEPS that a kind of model has checkpoints for."""
        return [step for step in STEPS if step[0] in "AB" or (kind, step[0]) in self.bad]

    def place(self, tp: int) -> list[int]:
        """The GPUs of the next servers: those of one GPU in turn."""
        if tp > 1:
            return list(range(tp))
        self._turn += 1
        return [self._turn % max(1, self.options.gpus)]

    def flags(self) -> list[str]:
        flags = ["--max-model-len", "512", "--max-num-seqs", "4", "--max-num-batched-tokens", "1024"]
        if self.options.gpus:
            flags += SHARED_GPU
            if self.options.compilation == "graphs":
                flags += ["--compilation-config", GRAPHS]
        return flags

    def reference(self, kind: str, tp: int, gpus: list[int], letter: str) -> dict[str, Any]:
        """What a server is like that loads the checkpoint itself."""
        name = f"{kind}-tp{tp}-loads-{letter}"
        with serve(self.host, self.processes, name, self.work / kind / letter, tp, gpus, *self.flags()) as server:
            server.wait()
            return state(server.url)

    def live(self, kind: str, tp: int, gpus: list[int], recorded: str) -> tuple[float, list[dict[str, Any]]]:
        """Seconds until it was ready, and what was seen of the server that is updated. recorded: on or off."""
        name = f"{kind}-tp{tp}-recorded-{recorded}"
        seen, plan = self.work / f"{name}.json", self.work / f"{name}.plan.json"
        steps: list[dict[str, Any]] = [
            {"version": f"{letter}{i}", "checkpoint": str(self.work / kind / letter), "by": by, "requests": requests}
            for i, (letter, by, requests) in enumerate(self.steps(kind))
            if by != "cli"
        ]
        flags = [*self.flags(), "--load-format", "dummy"]
        host = dataclasses.replace(self.host, settings={"CHECKPOINT_ENGINE_RECORDED_LOADS": recorded})
        with serve(host, self.processes, name, self.work / kind / "A", tp, gpus, *flags) as server:
            plan.write_text(json.dumps({"url": server.url, "out": str(seen), "steps": steps}))
            ready = server.wait()
            self._ranks(server, tp, gpus, self.work / f"{name}.ranks.log", "real_vllm.updates", str(plan))
            found: list[dict[str, Any]] = json.loads(seen.read_text())
            found.append(self._command(server, kind, tp, gpus, self.work / f"{name}.cli.log"))
        for step, (letter, _, _) in zip(found[1:], self.steps(kind), strict=True):
            step["checkpoint"] = letter
            if (kind, letter) in self.bad:
                step["bad"] = self.bad[kind, letter]
        return ready, found

    def _ranks(self, server: Server, tp: int, gpus: list[int], log: Path, *command: str) -> None:
        """Run a module under torchrun beside a server. Raises ServerDiedError when one of them ends badly."""
        line = torchrun(self.host, tp, "-m", *command)
        with self.processes.run(line, self.host.environment(gpus), log) as ranks:
            while ranks.poll() is None:
                server.check()
                time.sleep(0.2)
        if ranks.returncode:
            raise ServerDiedError(f"{log.name}: ended with {ranks.returncode}: {last_error(log)}")

    def _command(self, server: Server, kind: str, tp: int, gpus: list[int], log: Path) -> dict[str, Any]:
        """What is seen after `checkpoint-engine update` with B."""
        options = ["--checkpoint", str(self.work / kind / "B"), "--endpoint", server.url, "--inference-parallel-size", str(tp)]
        options += ["--engine", "vllm", "--weight-version", "cli", "--json"]
        begun = time.perf_counter()
        self._ranks(server, tp, gpus, log, "checkpoint_engine", "update", *options)
        seconds = time.perf_counter() - begun
        step = {"version": "cli", "by": "cli", "command_seconds": seconds, "status": rpc(server.url, "weights_status")}
        return {**step, **state(server.url)}


def twice(function: Any, *args: Any) -> Any:
    """Servers that start side by side may take each other's ports; once more, then."""
    try:
        return function(*args)
    except ServerDiedError as e:
        if "Address already in use" not in str(e) and "EADDRINUSE" not in str(e):
            raise
        return function(*args)


def judged(kind: str, tp: int, futures: dict[str, concurrent.futures.Future[Any]], results: dict[str, Any]) -> Iterator[Row]:
    """A row for each server that was updated, and one more where something is missing."""
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for name, future in futures.items():
        try:
            found[name] = future.result(timeout=0)
        except concurrent.futures.CancelledError:
            wrong.append(f"{name}: out of time")
        except Exception as e:
            wrong.append(f"{name}: {type(e).__name__}: {e}")
    results[f"{kind}-tp{tp}"] = dict(found)
    lives = {way: found.pop(way) for way in ("updated", "recorded") if way in found}
    if wrong:
        yield Row((kind, str(tp), *["-"] * (len(HEADINGS) - 2)), tuple(wrong))
    if {"A", "B"} <= found.keys():
        for way, (ready, steps) in lives.items():
            yield judge(kind if way == "updated" else f"{kind} {way}", tp, ready, steps, found)


def main() -> int:
    options = arguments()
    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="real-vllm-"))
    run = Run(options, work)
    jobs: dict[tuple[str, int], dict[str, concurrent.futures.Future[Any]]] = {}
    pool = concurrent.futures.ThreadPoolExecutor(options.servers)
    try:
        for kind in options.kinds.split(","):
            run.make(kind)
            say(f"[{time.monotonic() - start:.0f} s] {kind}: checkpoints made")
            for tp in sorted(map(int, options.tp.split(",")), reverse=True):
                gpus = run.place(tp)
                jobs[kind, tp] = {"updated": pool.submit(twice, run.live, kind, tp, gpus, "off")}
                if options.recorded:
                    jobs[kind, tp]["recorded"] = pool.submit(twice, run.live, kind, tp, gpus, "on")
                jobs[kind, tp] |= {
                    "A": pool.submit(twice, run.reference, kind, tp, gpus, "A"),
                    "B": pool.submit(twice, run.reference, kind, tp, gpus, "B"),
                }
                for name, future in jobs[kind, tp].items():
                    future.add_done_callback(_tell(f"{kind} tp={tp} {name}", start))
        every = [future for futures in jobs.values() for future in futures.values()]
        concurrent.futures.wait(every, timeout=max(0.0, options.seconds - (time.monotonic() - start)))
    finally:
        for futures in jobs.values():
            for future in futures.values():
                future.cancel()
        run.processes.end()
        pool.shutdown(wait=True)
    results: dict[str, Any] = {}
    rows = [row for (kind, tp), futures in jobs.items() for row in judged(kind, tp, futures, results)]
    text = table(rows)
    (options.out / "table.txt").write_text(text + "\n")
    (options.out / "results.json").write_text(json.dumps(results))
    with tarfile.open(options.out / "logs.tgz", "w:gz") as logs:
        for log in sorted(work.glob("*.log")):
            logs.add(log, log.name)
    shutil.rmtree(work, ignore_errors=True)
    passed = sum(not row.wrong for row in rows)
    say(text)
    say(f"{passed} of {len(rows)} passed in {time.monotonic() - start:.0f} s")
    return 0 if passed == len(rows) else 1


def _tell(what: str, start: float) -> Any:
    def tell(future: concurrent.futures.Future[Any]) -> None:
        if not future.cancelled():
            error = future.exception()
            end = f"{type(error).__name__}: {str(error)[:300]}" if error else "done"
            say(f"[{time.monotonic() - start:.0f} s] {what}: {end}")

    return tell


if __name__ == "__main__":
    sys.exit(main())
