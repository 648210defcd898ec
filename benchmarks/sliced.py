"""What checks cost in updates whose workers replay half of each tensor: of slices, of whole tensors, and none.

    python -m benchmarks.sliced [--width 1024] [--rounds 5]

Two servers on this host's CPU, each with a worker that loads a tensor-parallel half as vLLM does (`side/tpmodel.py`); "pull". In
each round the same bytes are registered anew, and updated to three times, in turn. CPU seconds are those of the workers. Use the
ratios. That of CPU seconds is between updates that check whole tensors and that check slices: in the checks alone.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from benchmarks.decoder import sizes, total, wide

from checkpoint_engine.planning.stripe import stripe
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.settings import MIB, Settings
from checkpoint_engine.worker import WeightsState, recorded, update_weights_from_ipc

RANKS, LAYERS = 2, 24
WAYS = {"slices": "on", "whole": "on", "none": "off"}
SECONDS = 300.0
_context = multiprocessing.get_context("spawn")


def _worker(pipe: Connection, rank: int, width: int, directory: str) -> None:
    sys.path.insert(0, str(Path(__file__).parent / "side"))
    from tpmodel import TPModel  # type: ignore[import-not-found]

    os.environ.update(CHECKPOINT_ENGINE_SOCKET_DIR=directory, CHECKPOINT_ENGINE_RECORDED_LOADS="on")
    torch.set_num_threads(1)
    specified = [(name, shape, dtype) for name, (shape, dtype) in wide(LAYERS, width).items()]
    model = TPModel(specified, RANKS, rank, "cpu")
    module, state, trusted = torch.nn.Module(), WeightsState(), recorded.trusted
    for name, tensor in model.p.items():
        module.register_buffer(name.replace(".", "_"), tensor)
    with contextlib.suppress(EOFError):
        while True:
            handle, way = pipe.recv()
            recorded.trusted = (lambda _: []) if way == "whole" else trusted
            cpu = time.process_time()
            update_weights_from_ipc(None, handle, 0, run=model.load_weights, state=state, model=module)
            pipe.send(time.process_time() - cpu)


def _server(rank: int, width: int, rounds: int, worker: Connection, out: Connection, directory: str, port: int) -> None:
    os.environ.update(CHECKPOINT_ENGINE_SOCKET_DIR=directory, MASTER_ADDR="127.0.0.1", LOCAL_RANK=str(rank))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    model = wide(LAYERS, width)
    mine = stripe(sizes(model), RANKS, 16 * MIB)[rank]
    generator = torch.Generator().manual_seed(rank)
    weights = {name: torch.randn(model[name][0], generator=generator).to(model[name][1]) for name in mine}
    cpu = [0.0]

    def ask(handles: list[tuple[str, str]], way: str) -> None:
        worker.send((handles[rank][1], way))
        cpu[0] = worker.recv()

    with ParameterServer(auto_pg=False, master_port=port, settings=Settings.from_environment(method="pull")) as ps:
        ps.register_checkpoint("c", named_tensors=weights)
        ps.gather_metas("c")
        for number in range(rounds + 1):
            for way, verify in WAYS.items():
                report = ps.update("c", lambda handles, way=way: ask(handles, way), verify=verify)
                checked = report.ranks[rank].get("verify")
                facts = report.seconds, cpu[0], checked.nbytes if checked else 0, checked.seconds if checked else 0.0
                if number:  # the first round records and proves
                    if set(report.ways) != {"replayed"}:
                        raise RuntimeError(f"some rank did not replay: {report.notes}")
                    out.send((way, *facts))
    out.send(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--width", type=int, default=1024, help="of the decoder; a real one's, for rows of other widths are rare, and slower"
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    seen: dict[str, list[list[Any]]] = {way: [[] for _ in range(RANKS)] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="ce-bench-") as directory, socket.socket() as free, contextlib.ExitStack() as stack:
        os.chmod(directory, 0o700)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] - 1
        free.close()
        outs = []
        for rank in range(RANKS):
            near, far = _context.Pipe()
            out, theirs = _context.Pipe(duplex=False)
            both = (rank, arguments.width, arguments.rounds, near, theirs, directory, port)
            for target, args in ((_worker, (far, rank, arguments.width, directory)), (_server, both)):
                process = _context.Process(target=target, args=args, daemon=True)
                process.start()
                stack.callback(process.kill)
            for end in (near, far, theirs):
                end.close()
            outs.append(out)
        for rank, out in enumerate(outs):
            while out.poll(SECONDS) and (told := out.recv()) is not None:
                seen[told[0]][rank].append(told[1:])
    model = wide(LAYERS, arguments.width)
    print(f"{total(model) / 1e9:.3f} GB, {len(model)} tensors; medians")
    median = {way: _median(ranks) for way, ranks in seen.items()}
    for way, (seconds, cpu, nbytes, busy) in median.items():
        print(f"{way:<8}{seconds:8.3f} s {cpu:8.3f} CPU s, checked {nbytes / 1e9:.3f} GB in {busy:.3f} s")
    checks = [median[way][1] - median["none"][1] for way in ("slices", "whole")]
    print(f"CPU seconds of checks: slices {checks[0]:.3f}, whole {checks[1]:.3f}: {checks[0] / checks[1]:.2f} x")
    for other in ("whole", "none"):
        ratios = [a / b for a, b in zip(_seconds(seen["slices"]), _seconds(seen[other]), strict=True)]
        print(f"updates: slices / {other} {statistics.median(ratios):.2f} x (median of the rounds)")


def _seconds(ranks: list[list[Any]]) -> list[float]:
    """Of each round, on the slower rank."""
    return [max(told[0] for told in same) for same in zip(*ranks, strict=True)]


def _median(ranks: list[list[Any]]) -> list[float]:
    """Seconds, and of all ranks together CPU seconds, bytes, and seconds at work."""
    sums = [[sum(told[i] for told in same) for i in (1, 2, 3)] for same in zip(*ranks, strict=True)]
    return [statistics.median(_seconds(ranks)), *(statistics.median(column) for column in zip(*sums, strict=True))]


if __name__ == "__main__":
    main()
