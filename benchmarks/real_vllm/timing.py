"""How long does an update of a real vLLM server take, by which implementation and which way of loading?

Runs one case after the other, or starts all at once: IMPLEMENTATION:MODEL[:METHOD,...]. IMPLEMENTATION: ours or upstream. MODEL:
one of models.py. METHOD: update_weights_from_ipc (the implementation's own extension; the default), bench_recorded (the same with
recorded loads; only ours), bench_pulled (that, straight out of the servers' memory), bench_plain (bare load_weights) or
bench_layerwise (vLLM's own layerwise reload). A line for each round, then a table; figures are medians without the first round,
of bench_recorded without the first two, in which loads are recorded, and replayed while regions may be mapped. The extension's
own way is measured without recorded loads.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import shutil
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from real_vllm.models import SHAPES, save
from real_vllm.server import ROOT, Host, Processes, ServerDiedError, last_error, say, serve, torchrun

OWN = "update_weights_from_ipc"
HEADINGS = ("case", "method", "GB", "gather s", "update s", "pause s", "load_weights s", "post_hook s", "extra GiB", "digest")
_saving = threading.Lock()
GRAPHS = '{"mode":0,"cudagraph_mode":"FULL_DECODE_ONLY"}'


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="CASE", type=case)
    parser.add_argument("--out", type=Path, required=True, help="folder for timing.json, table.txt and logs.tgz")
    parser.add_argument("--upstream", type=Path, help="folder where the wheel checkpoint-engine==0.4.2 was unpacked")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=2, help="of this host; 0: vLLM's build for CPUs")
    parser.add_argument("--rounds", type=int, default=4, help="updates by each method; bench_layerwise: 2 at most")
    parser.add_argument("--together", action="store_true", help="start all servers at once; their updates still come one by one")
    parser.add_argument("--seconds", type=float, default=560.0, help="for all cases; later ones are left out then")
    parser.add_argument("--python", default=sys.executable, help="interpreter with vLLM")
    parser.add_argument("--ranks-python", default=sys.executable, help="interpreter for the parameter servers")
    parser.add_argument("--known", type=Path, help="folder of vLLM's model descriptions, copied to each server's cache")
    return parser.parse_args()


def case(text: str) -> tuple[str, str, list[str]]:
    implementation, _, rest = text.partition(":")
    model, _, methods = rest.partition(":")
    if implementation not in ("ours", "upstream") or model not in SHAPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not ours|upstream:MODEL[:METHOD,...] with MODEL of {', '.join(SHAPES)}")
    return implementation, model, methods.split(",") if methods else [OWN]


def case_name(implementation: str, model: str, methods: list[str]) -> str:
    """Of its files."""
    return f"{implementation}-{model}-{'-'.join(methods)}"


def run_case(
    options: argparse.Namespace, processes: Processes, work: Path, end: float, implementation: str, model: str, methods: list[str]
) -> dict[str, Any]:
    """What timed.py wrote, and "error" when something ended early. Server and ranks start at once: both take a minute."""
    source = ROOT / "src" if implementation == "ours" else options.upstream.resolve()
    known = options.known.resolve() if options.known else None
    settings = {"CHECKPOINT_ENGINE_RECORDED_LOADS": "off"}  # until bench_recorded switches them on
    host = Host(options.python, options.ranks_python, source, work, known, options.gpus, settings)
    name = case_name(implementation, model, methods)
    ready = work / f"{name}.ready"
    others = [work / f"{case_name(*each)}.ready" for each in options.cases] if options.together else []
    with _saving:  # threads may not import the same module lazily at the same time
        folder = save(work / name, SHAPES[model], None)
    out, plan, log = work / f"{name}.json", work / f"{name}.plan.json", work / f"{name}.ranks.log"
    flags = ["--load-format", "dummy", "--max-model-len", "1024", "--max-num-seqs", "16", "--skip-tokenizer-init"]
    if options.gpus:
        # The share of memory is not what it takes, but what must be free, where the KV cache has a size.
        flags += ["--gpu-memory-utilization", "0.04", "--kv-cache-memory-bytes", str(2 << 30), "--compilation-config", GRAPHS]
    gpus = range(options.tp)
    error = None
    try:
        with serve(host, processes, name, folder, options.tp, gpus, *flags) as server:
            asked = {"url": server.url, "out": str(out), "model": model, "methods": methods, "rounds": options.rounds}
            turns = {
                "ready": str(ready),
                "others": list(map(str, others)),
                "lock": str(work / "lock"),
                "turn": str(work / f"{name}.turn"),
            }
            plan.write_text(json.dumps(asked | turns))
            command = torchrun(host, options.tp, "-m", "real_vllm.timed", str(plan))
            with processes.run(command, host.environment(gpus), log) as ranks:
                while ranks.poll() is None:
                    server.check()
                    if time.monotonic() > end:
                        raise ServerDiedError("out of time")
                    time.sleep(0.2)
            if ranks.returncode:
                raise ServerDiedError(f"{log.name}: ended with {ranks.returncode}: {last_error(log)}")
    except ServerDiedError as e:
        error = str(e)
    finally:
        ready.touch()  # nobody waits for what is gone
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rounds": [], "digests": {}, "nbytes": 0}
    return {**found, "case": f"{implementation}:{model}", "error": error}


def inside(one: dict[str, Any]) -> float | None:
    """Seconds in the engine's own load_weights, on the slowest rank; None where nobody measured it."""
    measured: list[float] = [a["inside"] for a in one.get("answers", ()) if isinstance(a, dict) and "inside" in a]
    told: float | None = one.get("stages", {}).get("load_weights")
    return max(measured, default=told)


def line(case: str, one: dict[str, Any]) -> str:
    stages = " ".join(f"{name} {seconds:.3f}" for name, seconds in one.get("stages", {}).items())
    workers = [a for a in one.get("answers", ()) if isinstance(a, dict)]
    return (
        f"ROUND {case} {one['method']}: gather {one['gather']:.3f} s, update {one['update']:.3f} s, pause {one['pause']:.3f} s, "
        f"in load_weights {_number(inside(one))} s, extra {one['extra_bytes'] / 2**30:.2f} GiB; {stages} {workers}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def cells(found: dict[str, Any], method: str) -> tuple[str, ...]:
    rounds = [one for one in found["rounds"] if one["method"] == method]
    later = rounds[2 if method == "bench_recorded" else 1 :] or rounds[-1:]
    if not later:
        return found["case"], method, *["-"] * (len(HEADINGS) - 2)

    def middle(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        return _number(median(known) if known else None)

    figures = [middle([one[name] for one in later]) for name in ("gather", "update", "pause")]
    figures += [middle([inside(one) for one in later]), middle([one.get("stages", {}).get("post_hook") for one in later])]
    extra = max(one["extra_bytes"] for one in rounds) / 2**30
    digest = ",".join(found["digests"].get(method, ["-"]))
    return found["case"], method, f"{found['nbytes'] / 1e9:.1f}", *figures, f"{extra:.2f}", digest


def main() -> int:
    options = arguments()
    start = time.monotonic()
    if options.upstream is None and any(implementation == "upstream" for implementation, _, _ in options.cases):
        say("upstream needs --upstream FOLDER")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    work, processes = Path(tempfile.mkdtemp(prefix="real-vllm-")), Processes()
    lines: list[tuple[str, ...]] = [HEADINGS]
    every: list[dict[str, Any]] = []
    pool = concurrent.futures.ThreadPoolExecutor(len(options.cases) if options.together else 1)
    run = functools.partial(run_case, options, processes, work, start + options.seconds)
    begun = [pool.submit(run, *each) for each in options.cases]
    for (_, _, methods), future in zip(options.cases, begun, strict=True):
        try:
            found = future.result()
        except KeyboardInterrupt:  # tell what was measured so far
            processes.end()
            found = future.result()
        every.append(found)
        for one in found["rounds"]:
            say(line(found["case"], one))
        outcome = f"register {found.get('register', 0):.1f} s, {found['error'] or 'ok'}"
        say(f"[{time.monotonic() - start:.0f} s] {found['case']}: {outcome}")
        lines += [cells(found, method) for method in methods]
    widths = [max(len(each[column]) for each in lines) for column in range(len(HEADINGS))]
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(each, widths, strict=True)).rstrip() for each in lines)
    (options.out / "timing-table.txt").write_text(text + "\n")
    (options.out / "timing.json").write_text(json.dumps(every))
    with tarfile.open(options.out / "timing-logs.tgz", "w:gz") as logs:
        for log in sorted(work.glob("*.log")):
            logs.add(log, log.name)
    shutil.rmtree(work, ignore_errors=True)
    say(text)
    return 1 if any(found["error"] for found in every) else 0


if __name__ == "__main__":
    sys.exit(main())
