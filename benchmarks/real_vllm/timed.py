"""One rank of either implementation's parameter server, timed while it updates a vLLM server; torchrun starts it with a plan.

Uses only the names of the drop-in contract, and the server's HTTP API directly, so that both implementations do the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import torch

from checkpoint_engine.ps import ParameterServer
from real_vllm.models import SHAPES, tensors
from real_vllm.server import READY_SECONDS, http, rpc

PULLED = "bench_pulled"
"""bench_recorded, and workers pull from the servers' memory whatever `auto` would choose."""
NOISE = 1 << 30
"""Bytes per dtype that all tensors are views of: registering copies them, so the checkpoint is as large as it says."""
SECONDS = 280.0
TURN_SECONDS = 900.0
SLOW_ROUNDS = 2
"""vLLM's layerwise reload takes most of a minute for a large model."""


def share(model: str, rank: int, world_size: int) -> tuple[dict[str, torch.Tensor], int]:
    """This rank's tensors, each owned by the rank with the least bytes so far, and the bytes of all."""
    noise: dict[torch.dtype, torch.Tensor] = {}
    mine: dict[str, torch.Tensor] = {}
    load = [0] * world_size
    for index, (name, size, dtype) in enumerate(tensors(SHAPES[model])):
        nbytes = torch.Size(size).numel() * dtype.itemsize
        owner = load.index(min(load))
        load[owner] += nbytes
        if owner == rank:
            if dtype not in noise:
                noise[dtype] = _noise(dtype)
            place = random.Random(index).randrange((NOISE - nbytes) // 256 + 1) * 256
            mine[name] = noise[dtype][place : place + nbytes].view(dtype).view(size)
    return mine, sum(load)


def _noise(dtype: torch.dtype) -> torch.Tensor:
    """NOISE bytes of finite numbers: scales (float32) are positive, weights like a model's."""
    some = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02
    if dtype is torch.float32:
        some = some.abs() / 448 + 1e-6
    elif dtype is torch.float8_e4m3fn:
        some = (some * 5000).clamp(-448, 448)
    data = some.to(dtype).view(torch.uint8)
    return data.repeat(NOISE // data.numel())


@contextlib.contextmanager
def memory_watched(seen: dict[str, Any], device: int) -> Any:
    """Puts into `seen` by how much less device memory was free at the worst moment than before, bytes."""
    before = low = torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal low
        if before:
            torch.cuda.set_device(device)  # or this thread makes a context on GPU 0
            while not stop.wait(0.005):
                low = min(low, torch.cuda.mem_get_info(device)[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        seen["extra_bytes"] = before - low


def post(url: str, path: str) -> None:
    http.post(f"{url}{path}", timeout=SECONDS).raise_for_status()


def wait_ready(url: str) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        try:
            if http.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"{url} was not ready within {READY_SECONDS} s")


def one_round(ps: Any, url: str, method: str, rank: int, world_size: int) -> dict[str, Any]:
    """gather_metas; then, while generation is paused, update. Seconds of each, and the engine's answers."""
    seen: dict[str, Any] = {"method": method}
    options, call = ({"method": "pull"}, "bench_recorded") if method == PULLED else ({}, method)

    def ask(handles: list[tuple[str, str]]) -> None:
        if rank == 0:
            seen["answers"] = rpc(url, call, dict(handles[:world_size]), seconds=SECONDS)
            refused = [a for a in seen["answers"] if isinstance(a, dict) and a.get("ok") is False]
            if refused:
                raise RuntimeError(f"refused: {refused}")

    if rank == 0:
        rpc(url, "bench_zero")
    begun = time.perf_counter()
    ps.gather_metas("c")
    gathered = time.perf_counter()
    with memory_watched(seen, rank):
        if rank == 0:
            post(url, "/pause?mode=keep&clear_cache=true")
        paused = time.perf_counter()
        report = ps.update("c", ask, **options)
        updated = time.perf_counter()
        if rank == 0:
            post(url, "/reset_prefix_cache?reset_running_requests=true")
            post(url, "/resume")
    seen |= {"gather": gathered - begun, "update": updated - paused, "pause": time.perf_counter() - gathered}
    if report is not None:
        seen["stages"] = {name: stage["seconds"] for name, stage in report.to_dict()["stages"].items()}
    return seen


@contextlib.contextmanager
def my_turn(plan: dict[str, Any], rank: int) -> Iterator[None]:
    """Wait until the servers of all benchmarks that were started with this one are ready, or gone, and none of them is being
    updated; meanwhile none is."""
    turn, end = Path(plan["turn"]), time.monotonic() + TURN_SECONDS
    Path(plan["ready"]).touch()
    _await(end, "the other servers to be ready", lambda: all(Path(other).exists() for other in plan["others"]))
    with Path(plan["lock"]).open("w") as lock:
        if rank == 0:
            _await(end, "this benchmark's turn", lambda: _locked(lock))
            turn.touch()
        _await(end, "rank 0 to have this benchmark's turn", turn.exists)
        yield


def _await(end: float, what: str, is_so: Callable[[], bool]) -> None:
    while not is_so():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {TURN_SECONDS} s in vain for {what}")
        time.sleep(0.05)


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    mine, nbytes = share(plan["model"], rank, world_size)
    ps = ParameterServer(auto_pg=True, mem_fraction=0.5)
    begun = time.perf_counter()
    ps.register_checkpoint("c", named_tensors=mine)
    registered = time.perf_counter() - begun
    del mine
    wait_ready(plan["url"])
    found: dict[str, Any] = {"nbytes": nbytes, "register": registered, "rounds": [], "digests": {}}
    with my_turn(plan, rank):
        measure(ps, plan, rank, world_size, found)


def measure(ps: Any, plan: dict[str, Any], rank: int, world_size: int, found: dict[str, Any]) -> None:
    """All rounds by all methods, into `found` and what the plan calls "out"."""
    for method in plan["methods"]:
        for _ in range(min(SLOW_ROUNDS, plan["rounds"]) if method == "bench_layerwise" else plan["rounds"]):
            found["rounds"].append(one_round(ps, plan["url"], method, rank, world_size))
            if rank == 0:
                Path(plan["out"]).write_text(json.dumps(found))
            time.sleep(0.5)
        if rank == 0:
            found["digests"][method] = [answer["digest"] for answer in rpc(plan["url"], "bench_digest")]
            Path(plan["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
