"""Updates that read from a peer, against what carries them: a raw socket copy and the transport's own reads, in turn.

    python -m benchmarks.peer_update [--gib 1] [--rounds 5] [--transports tcp,shm,...] [--netns] [--device cpu|cuda] [--json]

Two ranks; rank 0 holds all of a checkpoint, rank 1 nothing. One round is, for each transport, on the same bytes:

socket           sendall from rank 0's memory, recv_into in rank 1, over one TCP connection
transport        the transport's reads of rank 0's regions into host memory of rank 1, connected before the clock starts
update           update(ranks=[1]) into a worker that keeps nothing: agreement, connecting, reading, lifting, messages
update, loaded   the same into a worker that copies every tensor into parameters; they are compared at the end
broadcast        update of both ranks, each with such a worker, by the method that is named (on a CPU: mapping is switched off)

--netns: the ranks are in two network namespaces, joined by a veth pair, as on two hosts (needs root and `ip`). --device cuda:
each rank beside a GPU of its own, or both beside one; what is read goes through host slots into the GPU's. CPU is the source's
process, s/GB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from benchmarks.decoder import shapes, total, value

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # processes, and hosts that are namespaces

from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.server.sources import Metas
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.peer.base import PeerTransport, ReadOp, open_transport
from checkpoint_engine.worker import WeightsState, update_weights_from_ipc
from helpers.fleet import Worker, worker_processes
from helpers.netns import TwoHosts
from helpers.ranks import start_ranks

LAYERS = 24
SECONDS = 300.0
STEPS = ("socket", "transport", "update", "update, loaded", "broadcast")
GOALS = {"transport": ("socket", 0.8), "update": ("socket", 0.7)}
GPU_GOALS = {"update": ("transport", 0.8)}


def worker(pipe: Connection, environment: dict[str, str], device: int, nbytes: int) -> None:
    os.environ.update(environment)
    cuda = environment.get("CHECKPOINT_ENGINE_DEVICE") == "cuda"
    device = device % torch.cuda.device_count() if cuda else 0
    place = torch.device("cuda", device) if cuda else torch.device("cpu")
    parameters = {n: torch.zeros(shape, dtype=dtype, device=place) for n, (shape, dtype) in shapes(LAYERS, nbytes).items()}
    state = WeightsState()

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            parameters[name].copy_(tensor)

    while True:
        match pipe.recv():
            case ("update", handle, keep):
                run = load if keep else (lambda weights: None)
                update_weights_from_ipc(None, handle, device, run=run, state=state)
                pipe.send((True, None))
            case ("check",):
                wrong = [name for name, tensor in parameters.items() if not bool((tensor == value(name)).all())]
                pipe.send((not wrong, f"{len(wrong)} tensors are wrong"))


class Raw:
    """Rank 0: sends all its regions, one after the other, to whoever asks with a byte."""

    def __init__(self, host: str, regions: tuple[HostRegion, ...]) -> None:
        self.door = socket.create_server((host, 0))
        self._regions = regions
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError), self.door.accept()[0] as sock:
            while sock.recv(1):
                for region in self._regions:
                    sock.sendall(region.view(0, region.nbytes))


def read_socket(sock: socket.socket, memory: list[torch.Tensor]) -> None:
    sock.sendall(b"!")
    for each in memory:
        view, done = memoryview(each.numpy()), 0
        while done < len(view):
            done += sock.recv_into(view[done:])


class Reader:
    """Rank 1: by socket, and by the transport."""

    def __init__(self, transport: PeerTransport, metas: Metas, port: int, stack: contextlib.ExitStack) -> None:
        offer = metas.offers[0]
        if offer is None:
            raise RuntimeError("rank 0 makes no offer")
        self.memory = [torch.zeros(region.nbytes, dtype=torch.uint8) for region in offer.regions]
        self._destinations = [transport.register(each) for each in self.memory]
        for destination in self._destinations:
            stack.callback(transport.unregister, destination)
        self._peer = stack.enter_context(transport.connect(offer, seconds=30))
        self._regions = offer.regions
        self.sock = stack.enter_context(socket.create_connection((offer.addresses[0][0], port)))

    def read(self) -> None:
        reads = [
            self._peer.submit_read(destination, [ReadOp(region.region, 0, region.nbytes, 0)], seconds=SECONDS)
            for destination, region in zip(self._destinations, self._regions, strict=True)
        ]
        for read in reads:
            read.wait()


def measure(rank: int, world_size: int, crew: list[Worker], kind: str, nbytes: int, rounds: int) -> dict[str, Any]:
    """On each rank: step -> seconds and its process's CPU seconds in each round."""
    torch.set_num_threads(1)
    cuda = os.environ.get("CHECKPOINT_ENGINE_DEVICE") == "cuda"
    settings = Settings.from_environment(peer_transport=kind, map_regions=False, recorded_loads="off", method="broadcast")
    with ParameterServer(settings=settings) as ps, contextlib.ExitStack() as stack:
        if rank == 0:
            model = {name: torch.full(shape, value(name), dtype=d) for name, (shape, d) in shapes(LAYERS, nbytes).items()}
            ps.register_checkpoint("c", named_tensors=model)
            del model
        ps.gather_metas("c")
        metas = ps.get_metas()
        if not isinstance(metas, Metas):
            raise RuntimeError("no metas")
        raw = Raw(ps.watch.address, ps._registry["c"].regions) if rank == 0 else None
        port = raw.door.getsockname()[1] if raw else 0
        port = int(ps.watch.introduce(str(port).encode(), SECONDS)[0])
        reader = Reader(stack.enter_context(open_transport(kind)), metas, port, stack) if rank else None
        methods: set[str] = set()

        def request(keep: bool) -> Callable[[list[tuple[str, str]]], None]:
            return lambda handles: crew[rank].ask("update", handles[rank][1], keep, seconds=SECONDS)

        def update(keep: bool, ranks: list[int]) -> None:
            methods.add(ps.update("c", request(keep), ranks=ranks or None).method)

        work: dict[str, Callable[[], object]] = {
            "socket": lambda: read_socket(reader.sock, reader.memory) if reader else None,
            "transport": lambda: reader.read() if reader else None,
            "update": lambda: update(False, [1]),
            "update, loaded": lambda: update(True, [1]),
            "broadcast": lambda: update(True, []),
        }
        found: dict[str, list[tuple[float, float]]] = {step: [] for step in STEPS}
        for number in range(rounds + 1):
            for step in STEPS:
                ps.store_based_barrier()
                start, cpu = time.perf_counter(), time.process_time()
                work[step]()
                seconds = time.perf_counter() - start
                ps.store_based_barrier()  # rank 0's threads are at work for as long as rank 1 reads
                if number:  # the first one warms up
                    found[step].append((seconds, time.process_time() - cpu))
            if number == 0 and rank == 1:
                crew[1].ask("check", seconds=SECONDS)
        stack.close()
        if raw:
            raw.door.close()
        ps.store_based_barrier()
        device = torch.cuda.get_device_name(0) if cuda else "cpu"
        return {"found": found, "methods": sorted(methods - {"none"}), "device": device}


def run(kind: str, nbytes: int, rounds: int, hosts: list[Any], device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ce-bench-") as directory:
        os.chmod(directory, 0o700)
        os.environ |= {"CHECKPOINT_ENGINE_SOCKET_DIR": directory, "CHECKPOINT_ENGINE_DEVICE": device, "OMP_NUM_THREADS": "1"}
        with worker_processes(worker, [(number, nbytes) for number in range(2)]) as crew:
            ranks = start_ranks(measure, 2, crew, kind, nbytes, rounds, hosts=hosts)
            with ranks:
                source, reader = ranks.results(SECONDS)
    exact = total(shapes(LAYERS, nbytes))
    seconds = {step: [s for s, _ in reader["found"][step]] for step in STEPS}

    def against(step: str, base: str) -> float:
        return statistics.median(b / s for b, s in zip(seconds[base], seconds[step], strict=True))

    return {
        "transport": kind,
        "nbytes": exact,
        "device": reader["device"],
        "methods": reader["methods"],
        "steps": {
            step: {
                "gb_s": exact / statistics.median(seconds[step]) / 1e9,
                "against_socket": against(step, "socket"),
                "against_transport": against(step, "transport"),
                "source_cpu_s_per_gb": statistics.median(c for _, c in source["found"][step]) / exact * 1e9,
            }
            for step in STEPS
        },
    }


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['transport']}, {result['nbytes'] / 1e9:.2f} GB, {result['device']}; {', '.join(result['methods'])}")
    print(f"{'':16}{'GB/s':>8}{'x socket':>10}{'x transport':>13}{'source CPU s/GB':>17}")
    for step, row in result["steps"].items():
        ratios = f"{row['against_socket']:10.2f}{row['against_transport']:13.2f}"
        print(f"{step:16}{row['gb_s']:8.2f}{ratios}{row['source_cpu_s_per_gb']:17.3f}")
    goals = GOALS if result["device"] == "cpu" else GPU_GOALS
    if result["transport"] == "tcp" or goals is GPU_GOALS:
        for step, (base, goal) in goals.items():
            ratio = result["steps"][step][f"against_{base}"]
            print(f"{step} / {base}: {ratio:.2f}, goal >= {goal}: {'met' if ratio >= goal else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transports", default="tcp,shm")
    parser.add_argument("--netns", action="store_true")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="cuda where there is one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        hosts = list(stack.enter_context(TwoHosts()).hosts) if options.netns else []
        results = []
        for kind in options.transports.split(","):
            results.append(run(kind, int(options.gib * (1 << 30)), options.rounds, hosts, options.device))
            if not options.json:
                show(results[-1])
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
