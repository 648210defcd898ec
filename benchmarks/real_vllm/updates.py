"""One rank of a parameter server that updates a vLLM server step by step; torchrun starts it with a plan. Rank 0 looks at the
server after every step and writes what it saw."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from checkpoint_engine.engines import request_for_rank
from checkpoint_engine.engines.rollout import Policy
from checkpoint_engine.engines.vllm import Vllm
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.server import RolloutReport, UpdateReport
from real_vllm.server import READY_SECONDS, ask, rpc, state

SECONDS = 120.0


class Requests:
    """A client that keeps asking until told to stop; counts requests that were answered in full, and those that were not."""

    TOKENS = 150

    def __init__(self, url: str) -> None:
        self._url, self.answered, self.failed = url, 0, []  # type: tuple[str, int, list[str]]
        self._stop, self._first = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._stop.is_set():
            self._first.set()
            try:
                found = ask(self._url, [3, 1, 4, 1, 5], self.TOKENS)
            except Exception as e:
                self.failed.append(repr(e))
            else:
                self.answered += 1
                if len(found) != self.TOKENS:
                    self.failed.append(f"{len(found)} tokens")

    def __enter__(self) -> Requests:
        self._thread.start()
        self._first.wait(SECONDS)
        time.sleep(0.1)  # so that it is running when generation is paused, not queued
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def take_step(ps: ParameterServer, engine: Vllm, step: dict[str, Any]) -> dict[str, Any]:
    """Register, gather and update. Returns the report, or the error that it ended with."""
    version, file = step["version"], Path(step["checkpoint"]) / "model.safetensors"
    engines, paused = [engine], Policy(pause="keep")
    report: UpdateReport | RolloutReport
    try:
        if step["by"] == "push":
            report = ps.push(_share(file, ps), engines=engines, version=version, policy=paused)
        else:
            ps.register_checkpoint(version, files=[file], stripe=True)
            ps.gather_metas(version)
            if step["by"] == "roll_out":
                report = ps.roll_out(version, engines=engines, version=version, policy=paused)
            else:  # the contract's call; generation is not paused, and requests that run go on between two steps
                request = request_for_rank(engines, ps.rank, ps.world_size, version=version, seconds=SECONDS)
                report = ps.update(version, request, version=version)
            ps.unregister_checkpoint(version)
    except CheckpointEngineError as e:
        return {"version": version, "by": step["by"], "error": str(e)}
    return {"version": version, "by": step["by"], "report": report.to_dict()}


def _share(file: Path, ps: ParameterServer) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in sorted(tensors.keys())[ps.rank :: ps.world_size]}


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    leads = os.environ["RANK"] == "0"
    seen: list[dict[str, Any]] = []
    with ParameterServer() as ps, Vllm(plan["url"]) as engine:
        if leads:
            engine.wait_ready(READY_SECONDS)
            seen.append({"version": None, **state(plan["url"])})
        for step in plan["steps"]:
            if leads and step["requests"]:
                with Requests(plan["url"]) as requests:
                    seen.append(take_step(ps, engine, step))
                seen[-1] |= {"answered": requests.answered, "failed": requests.failed}
            else:
                seen.append(take_step(ps, engine, step))
            if leads:
                seen[-1]["status"] = rpc(plan["url"], "weights_status")
                if "error" not in seen[-1]:
                    seen[-1] |= state(plan["url"])
                Path(plan["out"]).write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
