"""Everything that only a host with GPUs can show, one stage after the other, each with a deadline; a table at the end.

    python -m benchmarks.gpu --out OUT [--gpus 2] [--upstream FOLDER] [--budget 570] [--vllm [--known FOLDER]] [STAGE ...]

Stages are run in their order, or in that in which they are named. One for which too little of the budget is left is left out, and
the table says so. OUT gets each stage's log, and a JSON record a run in side.jsonl. FOLDER is where the wheel
checkpoint-engine==0.4.2 was unpacked; without it nothing is compared. --vllm: this interpreter has vLLM.
Without a GPU the stages run on the CPU, to rehearse them: their figures then mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIDE = ROOT / "benchmarks" / "side" / "side.py"
MODELS = {"tiny-moe": 60, "qwen3-8b": 60, "qwen3-32b": 120, "qwen3-30b-a3b": 120}
"""Model -> seconds that a run of five rounds takes at most, most of them for making and registering the weights."""

VLLM_CASES = {
    "ours": "ours:qwen3-30b-a3b:update_weights_from_ipc,bench_recorded",
    "upstream": "upstream:qwen3-30b-a3b:update_weights_from_ipc,bench_plain",
    "fp8": "ours:qwen3-30b-a3b-fp8:update_weights_from_ipc,bench_recorded",
}


@dataclass(frozen=True)
class Stage:
    """A command and the seconds after which it is ended. needs: what the host or the arguments must have for it."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""


def stages(gpus: int, upstream: Path | None, out: Path, descriptions: Path | None) -> Iterator[Stage]:
    python = sys.executable
    unwanted = ["-p", "no:cacheprovider", "-p", "no:benchmark"]  # the latter warns of xdist, and warnings are errors
    pytest = [python, "-m", "pytest", "-v", "--tb=short", "--durations=15", "-m", "gpu", *unwanted]
    alone = "gives_everything_back or test_devices_cuda"  # look at the free memory of all the device
    several = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    yield Stage("tests", [*pytest, *several, "-k", f"not ({alone})", "tests"], 240)
    yield Stage("tests-alone", [*pytest, "-k", alone, "tests"], 120)
    yield Stage("probe", [python, "-m", "checkpoint_engine", "probe", "--json"], 60)
    yield Stage("floor", [python, "-m", "benchmarks.pipeline_floor"], 120)
    yield Stage("digests", [python, "-m", "benchmarks.digests"], 60)
    yield Stage("peers", [python, "-m", "benchmarks.peer_update", "--transports", "tcp,shm", "--gib", "4"], 180)
    for model, seconds in MODELS.items():

        def side(label: str, *more: str, model: str = model, seconds: float = seconds) -> Stage:
            folder = str(upstream) if label.startswith("upstream") else str(ROOT / "src")
            path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
            run = ["-m", "torch.distributed.run", "--nproc-per-node", str(gpus), "--master-port", "25400", str(SIDE), model]
            rest = ["--label", label, "--verify", "--rounds", "5", "--out", str(out / "side.jsonl"), *more]
            needs = "upstream" if label.startswith("upstream") else ""
            return Stage(f"{model}:{label}", [python, *run, *rest], 1.3 * seconds, {"PYTHONPATH": path}, needs)

        yield side("ours-recorded", "--recorded", "--then", "ours-loader:CHECKPOINT_ENGINE_RECORDED_LOADS=off")
        yield side("upstream", "--then", "upstream-2GB:PS_MAX_BUCKET_SIZE_GB=2")
        launch = [python, "-m", "torch.distributed.run", "--nproc-per-node", str(gpus), "--master-port", "25500"]
        records = ["--out", str(out / "side.jsonl"), "--traces", str(out / "traces")]
        yield Stage(f"{model}:variants", [*launch, "-m", "benchmarks.variants", *records, model], 1.6 * seconds)
    vllm = {"PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])}
    known = ["--known", str(descriptions)] if descriptions else []
    correct = [python, "-m", "real_vllm.correctness", "--seconds", "280", "--servers", "16", "--recorded", *known]
    yield Stage("vllm-correct", [*correct, "--out", str(out / "vllm")], 300, vllm, "vllm")
    timing = [python, "-m", "real_vllm.timing", "--out", str(out / "vllm"), *known]
    for label, cases in VLLM_CASES.items():
        needs = "upstream,vllm" if label == "upstream" else "vllm"
        more = ["--upstream", str(upstream)] if label == "upstream" else []
        yield Stage(f"vllm-timing:{label}", [*timing, *more, cases], 200, vllm, needs)


def run(stage: Stage, log: Path) -> int | None:
    """The exit code; None: it was ended at its deadline, with all that it had started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env={**os.environ, **stage.environment}, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return process.wait(stage.seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # On the first pytest sums up, and torchrun ends its ranks, which are not of its group.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(15)


def compared(out: Path) -> Iterator[str]:
    """One line a model and label: seconds, and how many times as fast as upstream was in this run."""
    records = out / "side.jsonl"
    rows = [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
    base = {row["model"]: row["median_s"] for row in rows if row["label"] == "upstream"}
    for row in rows:
        ratio = f"{base[row['model']] / row['median_s']:.2f} x" if row["model"] in base else "-"
        memory = f"+{row['extra_gpu_gib']:.2f} / +{row['held_gpu_gib']:.2f} GiB"
        right = "verified" if row["verified"] else f"WRONG {row['wrong']}"
        speed = f"{row['median_s']:8.4f} s {ratio:>8} {row['gb_per_s']:7.1f} GB/s"
        yield f"{row['model']:<15}{row['label']:<15}{speed}  {memory}  {right}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="STAGE", help="a stage, or the model or prefix of several")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--upstream", type=Path)
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--known", type=Path, help="folder of vLLM's model descriptions, which make its starts shorter")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all stages together")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.budget
    has = {"upstream": arguments.upstream is not None, "vllm": arguments.vllm}
    rows, failed = [], 0
    every = list(stages(arguments.gpus, arguments.upstream, arguments.out, arguments.known))
    named = [s for name in arguments.names for s in every if s.name == name or s.name.startswith((f"{name}:", f"{name}-"))]
    chosen = list({stage.name: stage for stage in named}.values())
    if arguments.names and not chosen:
        parser.error(f"no such stage; there are {', '.join(s.name for s in every)}")
    for stage in chosen or every:
        lacking = [need for need in filter(None, stage.needs.split(",")) if not has[need]]
        left = end - time.monotonic()
        if lacking or left < stage.seconds / 4:
            rows.append(f"{stage.name:<30} left out: {'no --' + ' --'.join(lacking) if lacking else f'{left:.0f} s are left'}")
            continue
        start = time.monotonic()
        limited = Stage(stage.name, stage.command, min(stage.seconds, left), stage.environment)
        log = arguments.out / f"{stage.name.replace(':', '-')}.log"
        code = run(limited, log)
        last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
        failed += code != 0
        state = "ended at its deadline" if code is None else f"exit {code}"
        rows.append(f"{stage.name:<30} {state}, {time.monotonic() - start:.0f} s: {last[:150]}")
        print(rows[-1], flush=True)
    print("\n" + "\n".join([*rows, "", *compared(arguments.out)]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
