"""One parameter server process of the demo. Reads one command per line from stdin, answers with one line each.

{"name": ..., "perturbed": bool} -> {"ok": true, "registered": seconds, "report": {...}} or {"ok": false, "error": ...}.
Ends when stdin does. Libraries may print to stdout, so answers go to a copy of it and the rest to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from checkpoint_engine.cli.demo.checkpoint import checkpoint_files, perturb, read_checkpoint
from checkpoint_engine.engines import get_engine, request_for_rank
from checkpoint_engine.ps import ParameterServer


def main(arguments: dict[str, Any], commands: IO[str], answers: IO[str]) -> None:
    """arguments: rank, world_size, master_port, urls of all engines, checkpoint (directory), seconds for one update."""
    rank, world_size = arguments["rank"], arguments["world_size"]
    with ExitStack() as stack:
        engines = [stack.enter_context(get_engine("sglang", url)) for url in arguments["urls"]]
        server = ParameterServer(
            rank=rank, world_size=world_size, auto_pg=True, master_addr="127.0.0.1", master_port=arguments["master_port"]
        )
        ps = stack.enter_context(server)
        _answer(answers, {"ok": True})
        for line in commands:
            command = json.loads(line)
            try:
                start = time.monotonic()
                _register(ps, Path(arguments["checkpoint"]), command["name"], command["perturbed"], rank, world_size)
                registered = time.monotonic() - start
                ps.gather_metas(command["name"])
                seconds = arguments["seconds"]
                request = request_for_rank(engines, rank, world_size, version=command["name"], seconds=seconds)
                report = ps.update(command["name"], request, timeout=timedelta(seconds=seconds), version=command["name"])
                _answer(answers, {"ok": True, "registered": registered, "report": report.to_dict()})
            except Exception as e:  # the demo shows it, whatever it is
                _answer(answers, {"ok": False, "error": f"{type(e).__name__}: {e}"})


def _register(ps: ParameterServer, directory: Path, name: str, perturbed: bool, rank: int, world_size: int) -> None:
    if not perturbed:
        ps.register_checkpoint(name, files=[str(f) for f in checkpoint_files(directory)], stripe=True)
        return
    # As a trainer would: every rank has some of the tensors in its memory.
    mine = sorted(read_checkpoint(directory).items())[rank::world_size]
    ps.register_checkpoint(name, named_tensors={n: perturb(n, t) for n, t in mine})


def _answer(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        main(json.loads(sys.argv[1]), sys.stdin, out)
