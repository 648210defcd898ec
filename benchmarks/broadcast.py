"""Updates over 2 ranks on one host's CPU, against what the same processes can do without us, in turn, in one run.

Two server processes, each with a worker process, which copies every tensor into parameters that are there already. One
round is, on the same bytes and with the same owner for each tensor:

raw, tensors    torch.distributed's gloo broadcast between the two servers, one call per tensor; nothing is loaded
raw, pieces     the same in pieces of 16 MiB, cut from one flat tensor

and then by each method (METHODS), with a ParameterServer of its own:

first           gather_metas and update of a ParameterServer that has never updated: links, ring, communicator, plan
further         gather_metas and update of the same one again
unchecked       the same with verify="off": workers make no digests of what they load
tiny            the same for a checkpoint of a few KiB, the second time: what an update costs besides its bytes

A time is from the first process's start to the last one's end. Processes compute with one thread each, as under torchrun.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.decoder import shapes, sizes, total, value

from checkpoint_engine.devices.probe import host_memory
from checkpoint_engine.devices.rates import memcpy_rate
from checkpoint_engine.planning.stripe import stripe
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.server.report import UpdateReport
from checkpoint_engine.settings import MIB, Settings
from checkpoint_engine.worker import WeightsState, update_weights_from_ipc

RANKS = 2
PIECE = 16 * MIB
SECONDS = 300.0
"""Deadline of each step, beyond which something hangs."""
METHODS = {"mapped": {"map_regions": True}, "broadcast": {"map_regions": False, "peer_copies": False}}
"""What UpdateReport.method says -> the settings that lead to it. The first is the default on one host's CPU."""
RAW = ("raw, tensors", "raw, pieces")
Series = dict[str, list[float]]
_context = multiprocessing.get_context("spawn")


@dataclasses.dataclass(frozen=True)
class Task:
    """layers of the model; nbytes of its checkpoint, about; changes: of Settings; directory: for sockets."""

    layers: int
    nbytes: int
    rounds: int
    changes: dict[str, Any]
    directory: str
    ports: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """seconds: variant -> one entry per round, "METHOD, VARIANT" for ours; cpu: the same, of all processes together. stages:
    method -> stage -> seconds at work in each further update, on its busiest rank. memcpy: bytes/second of one thread while
    nothing else of ours runs."""

    nbytes: int
    tensors: int
    seconds: Series
    cpu: Series
    stages: dict[str, Series]
    memcpy: float

    def median(self, variant: str) -> float:
        return statistics.median(self.seconds[variant])

    @property
    def raw(self) -> list[float]:
        """Seconds of the better of both raw broadcasts, by round."""
        return [min(pair) for pair in zip(*(self.seconds[raw] for raw in RAW), strict=True)]

    def ratio(self, variant: str, raw: str | None = None) -> float:
        """Median over the rounds of raw seconds / the variant's: the part of the raw rate that it reaches.

        raw: which raw broadcast; None: the better one.
        """
        base = self.raw if raw is None else self.seconds[raw]
        return statistics.median(r / s for r, s in zip(base, self.seconds[variant], strict=True))

    def cost(self, method: str) -> float:
        """Of checking digests: seconds of a further update / seconds of one that checks none, median over the rounds."""
        pairs = zip(self.seconds[f"{method}, further"], self.seconds[f"{method}, unchecked"], strict=True)
        return statistics.median(checked / unchecked for checked, unchecked in pairs)


def _worker(pipe: Connection, task: Task, directory: str) -> None:
    """The engine: parameters that are there, and a copy into them."""
    os.environ["CHECKPOINT_ENGINE_SOCKET_DIR"] = directory
    torch.set_num_threads(1)
    model = shapes(task.layers, task.nbytes)
    parameters = {name: torch.full(shape, -1.0, dtype=dtype) for name, (shape, dtype) in model.items()}
    parameters["tiny.weight"] = torch.full((1024,), -1.0)
    state = WeightsState()

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            parameters[name].copy_(tensor)

    def update(handle: str) -> float:
        cpu = time.process_time()
        update_weights_from_ipc(None, handle, 0, run=load, state=state)
        return time.process_time() - cpu

    def check() -> str | None:
        wrong = [name for name, tensor in parameters.items() if not bool((tensor == value(name)).all())]
        for tensor in parameters.values():
            tensor.fill_(-1.0)  # the next method has to load them all again
        return f"{len(wrong)} tensors are wrong, {wrong[0]} first" if wrong else None

    with contextlib.suppress(EOFError):  # the server is gone
        while True:
            handle = pipe.recv()
            try:
                pipe.send(check() if handle is None else update(handle))
            except Exception as e:
                pipe.send(f"{type(e).__name__}: {e}")


class Server:
    """One rank: its process group for the raw broadcasts, its part of the checkpoint, its worker."""

    def __init__(self, rank: int, task: Task, worker: Connection, report: Connection) -> None:
        self.rank, self.task, self.worker, self.report = rank, task, worker, report
        model = shapes(task.layers, task.nbytes)
        self.order = list(model)
        self.owner = {name: owner for owner, names in enumerate(stripe(sizes(model), RANKS, PIECE)) for name in names}
        # Mine carry the weights; the others' are where a raw broadcast goes.
        self.tensors = {
            name: torch.full(shape, value(name) if self.owner[name] == rank else -1.0, dtype=dtype)
            for name, (shape, dtype) in model.items()
        }
        self.flat = host_memory(-(-total(model) // PIECE) * PIECE)

    def timed(self, variant: str, work: Callable[[], object]) -> None:
        """Tell when `work` began and ended, on the clock that all processes of a host share, and its CPU seconds."""
        dist.barrier()
        self.worker_cpu = 0.0
        start, cpu = time.perf_counter(), time.process_time()
        work()
        self.report.send((variant, start, time.perf_counter(), time.process_time() - cpu + self.worker_cpu))

    def broadcast_tensors(self) -> None:
        for name in self.order:
            dist.broadcast(self.tensors[name], self.owner[name])

    def broadcast_pieces(self) -> None:
        for i in range(self.flat.numel() // PIECE):
            dist.broadcast(self.flat[i * PIECE : (i + 1) * PIECE], i % RANKS)

    def request(self, handles: list[tuple[str, str]]) -> None:
        self.worker_cpu = self.ask(handles[self.rank][1])

    def ask(self, handle: str | None) -> Any:
        """Have the worker take an update, which returns its CPU seconds, or (None) look at its parameters and spoil them."""
        self.worker.send(handle)
        if isinstance(answer := self.worker.recv(), str):
            raise RuntimeError(f"the worker of rank {self.rank}: {answer}")
        return answer

    def update(self, ps: ParameterServer, name: str, method: str, variant: str, verify: str = "on") -> None:
        def work() -> None:
            ps.gather_metas(name)
            reports.append(ps.update(name, self.request, verify=verify))

        reports: list[UpdateReport] = []
        self.timed(f"{method}, {variant}", work)
        if reports[0].method != method:
            raise RuntimeError(f"rank {self.rank} updated by {reports[0].method}, not {method}")
        if variant == "further" and self.rank == 0:
            self.report.send(("stages", method, {stage: s.seconds for stage, s in reports[0].stages.items()}))

    def raw(self, prefix: str = "") -> None:
        for variant, work in zip(RAW, (self.broadcast_tensors, self.broadcast_pieces), strict=True):
            self.timed(prefix + variant, work)

    def ours(self, method: str, port: int) -> None:
        settings = Settings.from_environment(**self.task.changes | METHODS[method])
        with ParameterServer(auto_pg=False, master_port=port, settings=settings) as ps:
            mine = {name: t for name, t in self.tensors.items() if self.owner[name] == self.rank}
            ps.register_checkpoint("big", named_tensors=mine)
            ps.register_checkpoint("tiny", named_tensors={"tiny.weight": torch.full((1024,), value("tiny.weight"))})
            self.update(ps, "big", method, "first")
            self.update(ps, "big", method, "further")
            self.update(ps, "big", method, "unchecked", "off")
            self.update(ps, "tiny", method, "tiny, first")
            self.update(ps, "tiny", method, "tiny")
            self.ask(None)
            dist.barrier()  # rank 0 takes the store with it

    def run(self) -> None:
        self.raw("warm ")  # pages and connections
        if self.rank == 0:
            half = self.flat.numel() // 2
            self.report.send(("memcpy", memcpy_rate(self.flat[:half], self.flat[half:], 0.5)))
        ports = iter(self.task.ports)
        for _ in range(self.task.rounds):
            self.raw()
            for method in METHODS:
                self.ours(method, next(ports))


def _server(rank: int, task: Task, worker: Connection, report: Connection) -> None:
    os.environ.update(CHECKPOINT_ENGINE_SOCKET_DIR=task.directory, MASTER_ADDR="127.0.0.1", LOCAL_RANK=str(rank))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = Path(task.directory, "group")
    patience = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=patience)
    Server(rank, task, worker, report).run()
    report.send(("end",))
    dist.barrier()
    dist.destroy_process_group()


def measure(*, nbytes: int, layers: int = 40, rounds: int = 5, **changes: Any) -> Result:
    """Run it. nbytes: of the checkpoint, about; changes: of Settings.

    Raises RuntimeError when a process fails (its traceback is on stderr), or when a parameter is wrong after a method's updates.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ce-bench-"))
        os.chmod(directory, 0o700)
        task = Task(layers, nbytes, rounds, changes, directory, tuple(_free_ports(rounds * len(METHODS))))
        reports = []
        for rank in range(RANKS):
            near, far = _context.Pipe()
            report, theirs = _context.Pipe(duplex=False)
            for target, args in ((_worker, (far, task, directory)), (_server, (rank, task, near, theirs))):
                process = _context.Process(target=target, args=args, daemon=True)
                process.start()
                stack.callback(_end, process)
            for end in (near, far, theirs):
                end.close()
            reports.append(report)
        seconds, cpu, stages, memcpy = _collect(reports)
    model = shapes(layers, nbytes)
    return Result(total(model), len(model), seconds, cpu, stages, memcpy)


def _collect(reports: list[Connection]) -> tuple[Series, Series, dict[str, Series], float]:
    """Seconds, CPU seconds, busy seconds of stages, memcpy."""
    times: list[dict[str, list[tuple[float, float, float]]]] = [{} for _ in reports]
    stages: dict[str, Series] = {method: {} for method in METHODS}
    memcpy = 0.0
    running = dict(zip(reports, range(len(reports)), strict=True))
    while running:
        if not (ready := wait(list(running), SECONDS)):
            raise RuntimeError(f"nothing was heard of ranks {sorted(running.values())} for {SECONDS:g} s")
        for report in ready:
            rank = running[report]  # type: ignore[index]
            try:
                message = report.recv()  # type: ignore[union-attr, call-arg]
            except EOFError:
                raise RuntimeError(f"rank {rank} failed") from None
            match message:
                case ("end",):
                    del running[report]  # type: ignore[arg-type]
                case ("memcpy", rate):
                    memcpy = rate
                case ("stages", method, busy):
                    for stage, spent in busy.items():
                        stages[method].setdefault(stage, []).append(spent)
                case (variant, start, end, used):
                    times[rank].setdefault(variant, []).append((start, end, used))
    seconds = {variant: _spans([t[variant] for t in times]) for variant in times[0]}
    cpu = {variant: [sum(r[2] for r in same) for same in zip(*(t[variant] for t in times), strict=True)] for variant in times[0]}
    return seconds, cpu, stages, memcpy


def _spans(by_rank: list[list[tuple[float, float, float]]]) -> list[float]:
    return [max(r[1] for r in same) - min(r[0] for r in same) for same in zip(*by_rank, strict=True)]


def _free_ports(count: int) -> list[int]:
    """Ports p such that p + 1, where a server's store listens, was free just now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] - 1 for s in sockets]


def _end(process: Any) -> None:
    process.join(5)
    process.kill()
    process.join()
