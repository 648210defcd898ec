"""A broadcast update over 2 ranks on the CPU, against what the same processes can do without us, in turn, in one run.

Two server processes, each with a worker process, which copies every tensor into parameters that are there already. One
round is, on the same bytes and with the same owner for each tensor:

raw, tensors    torch.distributed's gloo broadcast between the two servers, one call per tensor; nothing is loaded
raw, pieces     the same in pieces of 16 MiB, cut from one flat tensor
first           gather_metas and update of a ParameterServer that has never updated: links, ring, communicator, plan
further         gather_metas and update of the same one again
tiny            the same for a checkpoint of a few KiB, the second time: what an update costs besides its bytes

A time is from the first process's start to the last one's end. Processes compute with one thread each, as under torchrun.
"""

from __future__ import annotations

import dataclasses
import datetime
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint_engine.devices.probe import host_memory, memcpy_rate
from checkpoint_engine.planning.stripe import stripe
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.settings import MIB, Settings
from checkpoint_engine.worker import WeightsState, update_weights_from_ipc

RANKS = 2
PIECE = 16 * MIB
SECONDS = 300.0
"""Deadline of a whole run, beyond which something hangs."""
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
    """seconds: variant -> one entry per round; cpu: the same, of all processes together. stages: stage -> seconds at work in
    each further update, on its busiest rank. memcpy: bytes/second of one thread while nothing else of ours runs."""

    nbytes: int
    tensors: int
    seconds: Series
    cpu: Series
    stages: Series
    memcpy: float

    def median(self, variant: str) -> float:
        return statistics.median(self.seconds[variant])

    @property
    def raw(self) -> list[float]:
        """Seconds of the better of both raw broadcasts, by round."""
        return [min(pair) for pair in zip(self.seconds["raw, tensors"], self.seconds["raw, pieces"], strict=True)]

    def ratio(self, variant: str, raw: str | None = None) -> float:
        """Median over the rounds of raw seconds / the variant's: the part of the raw rate that it reaches.

        raw: which raw broadcast; None: the better one.
        """
        base = self.raw if raw is None else self.seconds[raw]
        return statistics.median(r / s for r, s in zip(base, self.seconds[variant], strict=True))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def shapes(layers: int, nbytes: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """A decoder of `layers` layers, about `nbytes` bytes in all: matrices in bf16, norms and routers' biases in fp32."""
    low, high = 1, 1 << 12
    while high - low > 1:  # the width, in steps of 64
        middle = (low + high) // 2
        low, high = (low, middle) if _nbytes(_decoder(layers, 64 * middle)) > nbytes else (middle, high)
    return _decoder(layers, 64 * low)


def _nbytes(model: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in model.values())


def _decoder(layers: int, width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    bf16, fp32 = torch.bfloat16, torch.float32
    model: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"model.embed_tokens.weight": ((16384, width), bf16)}
    for i in range(layers):
        for name, rows, columns in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", width // 4, width),
            ("self_attn.v_proj", width // 4, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", 7 * width // 2, width),
            ("mlp.up_proj", 7 * width // 2, width),
            ("mlp.down_proj", width, 7 * width // 2),
        ):
            model[f"model.layers.{i}.{name}.weight"] = ((rows, columns), bf16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            model[f"model.layers.{i}.{name}.weight"] = ((width,), fp32)
    model["model.norm.weight"] = ((width,), fp32)
    model["lm_head.weight"] = ((16384, width), bf16)
    return model


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

    while (handle := pipe.recv()) is not None:
        cpu = time.process_time()
        try:
            update_weights_from_ipc(None, handle, 0, run=load, state=state)
            pipe.send(time.process_time() - cpu)
        except Exception as e:
            pipe.send(f"{type(e).__name__}: {e}")
    wrong = [name for name, tensor in parameters.items() if not bool((tensor == _value(name)).all())]
    pipe.send(f"{len(wrong)} tensors are wrong, {wrong[0]} first" if wrong else 0.0)


def _value(name: str) -> float:
    """What a tensor is filled with: another value for most names, exact in bf16."""
    return float(sum(name.encode()) % 251)


class Server:
    """One rank: its process group for the raw broadcasts, its part of the checkpoint, its worker."""

    def __init__(self, rank: int, task: Task, worker: Connection, report: Connection) -> None:
        self.rank, self.task, self.worker, self.report = rank, task, worker, report
        model = shapes(task.layers, task.nbytes)
        self.order = list(model)
        sizes = [(name, torch.Size(shape).numel() * dtype.itemsize) for name, (shape, dtype) in model.items()]
        self.owner = {name: owner for owner, names in enumerate(stripe(sizes, RANKS, PIECE)) for name in names}
        # Mine carry the weights; the others' are where a raw broadcast goes.
        self.tensors = {
            name: torch.full(shape, _value(name) if self.owner[name] == rank else -1.0, dtype=dtype)
            for name, (shape, dtype) in model.items()
        }
        self.flat = host_memory(-(-sum(n for _, n in sizes) // PIECE) * PIECE)

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

    def ask(self, handle: str | None) -> float:
        """Have the worker take an update, or (None) look at its parameters and end. Returns CPU seconds."""
        self.worker.send(handle)
        answer = self.worker.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"the worker of rank {self.rank}: {answer}")
        return float(answer)

    def update(self, ps: ParameterServer, name: str, variant: str) -> None:
        def work() -> None:
            ps.gather_metas(name)
            stages = ps.update(name, self.request).stages
            self.report.send((f"stages of {variant}", {stage: s.seconds for stage, s in stages.items()}))

        self.timed(variant, work)

    def round(self, port: int) -> None:
        self.timed("raw, tensors", self.broadcast_tensors)
        self.timed("raw, pieces", self.broadcast_pieces)
        settings = Settings.from_environment(**self.task.changes)
        with ParameterServer(auto_pg=False, master_port=port, settings=settings) as ps:
            mine = {name: t for name, t in self.tensors.items() if self.owner[name] == self.rank}
            ps.register_checkpoint("big", named_tensors=mine)
            ps.register_checkpoint("tiny", named_tensors={"tiny.weight": torch.full((1024,), _value("tiny.weight"))})
            self.update(ps, "big", "first")
            self.update(ps, "big", "further")
            self.update(ps, "tiny", "tiny, first")
            self.update(ps, "tiny", "tiny")
            dist.barrier()  # rank 0 takes the store with it

    def run(self) -> None:
        for variant in ("raw, tensors", "raw, pieces"):  # pages and connections
            self.timed(f"warm {variant}", self.broadcast_tensors if variant == "raw, tensors" else self.broadcast_pieces)
        if self.rank == 0:
            half = self.flat.numel() // 2
            self.report.send(("memcpy", memcpy_rate(self.flat[:half], self.flat[half:], 0.5)))
        for port in self.task.ports:
            self.round(port)
        self.ask(None)


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

    Raises RuntimeError when a process fails (its traceback is on stderr), or when a parameter is wrong at the end.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ce-bench-"))
        os.chmod(directory, 0o700)
        task = Task(layers, nbytes, rounds, changes, directory, tuple(_free_ports(rounds)))
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
    return Result(_nbytes(model), len(model), seconds, cpu, stages, memcpy)


def _collect(reports: list[Connection]) -> tuple[Series, Series, Series, float]:
    """Seconds, CPU seconds, busy seconds of stages, memcpy."""
    times: list[dict[str, list[tuple[float, float, float]]]] = [{} for _ in reports]
    stages: dict[str, list[float]] = {}
    memcpy = 0.0
    running = dict(zip(reports, range(len(reports)), strict=True))
    until = time.monotonic() + SECONDS
    while running:
        ready = wait(list(running), max(0.0, until - time.monotonic()))
        if not ready:
            raise RuntimeError(f"ranks {sorted(running.values())} did not end within {SECONDS:g} s")
        for report in ready:
            rank = running[report]  # type: ignore[index]
            try:
                message = report.recv()  # type: ignore[union-attr]
            except EOFError:
                raise RuntimeError(f"rank {rank} failed") from None
            match message:
                case ("end",):
                    del running[report]  # type: ignore[arg-type]
                case ("memcpy", rate):
                    memcpy = rate
                case ("stages of further", busy) if rank == 0:
                    for stage, value in busy.items():
                        stages.setdefault(stage, []).append(value)
                case (variant, start, end, used):
                    times[rank].setdefault(variant, []).append((start, end, used))
    seconds = {variant: _spans([t[variant] for t in times]) for variant in times[0]}
    cpu = {variant: [sum(r[2] for r in same) for same in zip(*(t[variant] for t in times), strict=True)] for variant in times[0]}
    return seconds, cpu, stages, memcpy


def _spans(by_rank: list[list[tuple[float, float, float]]]) -> list[float]:
    return [max(r[1] for r in same) - min(r[0] for r in same) for same in zip(*by_rank, strict=True)]


def _free_ports(count: int) -> list[int]:
    """Ports p such that p + 1, where a server's store listens, was free just now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] - 1 for s in sockets]


def _end(process: Any) -> None:
    process.join(5)
    process.kill()
    process.join()
