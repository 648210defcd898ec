"""One parameter server process of the demo. Reads one command per line from stdin, answers with one line each.

{"name": ..., "perturbed": bool} -> {"ok": true, "registered": seconds, "report": {...}}: register it and update the engines.
{"save": PATH} -> {"ok": true, "cpu": seconds}: write the metas, and tell the processor time that this process took so far.
{"join": PATH} -> {"ok": true, "report": {...}}: load metas, and update the engine by reading from those who hold it.
Or {"ok": false, "error": ...}.
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
from checkpoint_engine.engines import Engine, get_engine, request_for_rank
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.server.sources import Metas
from checkpoint_engine.settings import Settings


def main(arguments: dict[str, Any], commands: IO[str], answers: IO[str]) -> None:
    """arguments: rank, world_size, master_port, urls of all engines, checkpoint (directory), seconds for one update,
    peer_transport (see Settings)."""
    rank, world_size = arguments["rank"], arguments["world_size"]
    settings = Settings.from_environment(peer_transport=arguments["peer_transport"])
    place = {"master_addr": "127.0.0.1", "master_port": arguments["master_port"]}
    with ExitStack() as stack:
        engines = [stack.enter_context(get_engine("sglang", url)) for url in arguments["urls"]]
        ps = stack.enter_context(ParameterServer(rank=rank, world_size=world_size, settings=settings, **place))
        _answer(answers, {"ok": True})
        for line in commands:
            command = json.loads(line)
            try:
                _answer(answers, {"ok": True, **_obey(ps, engines, command, arguments)})
            except Exception as e:  # the demo shows it, whatever it is
                _answer(answers, {"ok": False, "error": f"{type(e).__name__}: {e}"})


def _obey(ps: ParameterServer, engines: list[Engine], command: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    seconds = arguments["seconds"]
    if "save" in command:
        if ps.rank == 0:
            Path(command["save"]).write_bytes(ps.get_metas().to_json())
        return {"cpu": time.process_time()}
    start = time.monotonic()
    if "join" in command:
        metas = Metas.from_json(Path(command["join"]).read_bytes())
        ps.load_metas(metas)
        name, ranks = metas.checkpoint, [0]
    else:
        name, ranks = command["name"], []
        _register(ps, Path(arguments["checkpoint"]), name, command["perturbed"], ps.rank, ps.world_size)
    registered = time.monotonic() - start
    if not ranks:
        ps.gather_metas(name)
    request = request_for_rank(engines, ps.rank, ps.world_size, version=name, seconds=seconds)
    report = ps.update(name, request, timeout=timedelta(seconds=seconds), version=name, ranks=ranks)
    return {"registered": registered, "report": report.to_dict()}


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
