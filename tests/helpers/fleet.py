"""Parameter servers and workers as real processes. A worker serves commands over a pipe, as an engine serves requests."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from checkpoint_engine.devices.cpu import CpuDevice, CpuEvent
from checkpoint_engine.manifest import hex_digest
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.settings import Settings
from checkpoint_engine.worker import WeightsState, update_weights_from_ipc
from helpers.ranks import _context

Handles = list[tuple[str, str]]


LAST = -1


@dataclasses.dataclass(frozen=True)
class Orders:
    """How a worker behaves in one update. Buckets count from 0; LAST is the one that completes `tensors`."""

    raise_in_bucket: int | None = None
    raise_in_post_hook: bool = False
    die_in_bucket: int | None = None
    die_in_post_hook: bool = False
    stop_in_bucket: int | None = None
    scribble: bool = False  # write into the tensors it is shown
    lag: float = 0.0  # seconds by which the device is behind what the loader queued
    passes: int = 1
    connect: bool = True


class Model:
    """Keeps clones of what it is shown, and behaves as ordered."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.tensors: dict[str, torch.Tensor] = {}
        self.calls: list[list[str]] = []
        self.orders = Orders()
        self.state = WeightsState()

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.calls.append([name for name, _ in weights])
        bucket = LAST if sum(map(len, self.calls)) == len(tensors(0)) else len(self.calls) - 1
        if bucket == self.orders.die_in_bucket:
            os.kill(os.getpid(), signal.SIGKILL)
        if bucket == self.orders.stop_in_bucket:
            os.kill(os.getpid(), signal.SIGSTOP)
        self.tensors.update((name, tensor.clone()) for name, tensor in weights)
        if self.orders.scribble:
            for _, tensor in weights:
                tensor.zero_()
        if bucket == self.orders.raise_in_bucket:
            raise ValueError(f"no room for {weights[0][0]}")

    def post_hook(self) -> None:
        if self.orders.raise_in_post_hook:
            raise ValueError("post-processing went wrong")
        if self.orders.die_in_post_hook:
            os.kill(os.getpid(), signal.SIGKILL)

    def update(self, handle: str) -> list[str]:
        versions = []
        if self.orders.lag:
            CpuDevice.mark = lambda _: _late_event(self.orders.lag)  # type: ignore[method-assign]
        for _ in range(self.orders.passes):
            self.calls = []
            options = {"run": self.load, "post_hook": self.post_hook, "state": self.state}
            versions.append(update_weights_from_ipc(None, handle, self.device, **options))
        return versions

    def digests(self) -> dict[str, str]:
        return {name: digest(tensor) for name, tensor in self.tensors.items()}


def _late_event(seconds: float) -> CpuEvent:
    event = CpuEvent()
    threading.Timer(seconds, event.set, [None]).start()
    return event


def digest(tensor: torch.Tensor) -> str:
    """Of dtype, shape and bytes."""
    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return hex_digest(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + flat)


def _worker(pipe: Connection, variables: dict[str, str], device: int) -> None:
    os.environ.update(variables)
    model = Model(device)
    while True:
        command, *args = pipe.recv()
        try:
            match command:
                case "update":
                    handle, model.orders = args
                    answer: Any = model.update(handle) if model.orders.connect else []
                case "state":
                    answer = (*model.state.read(), model.digests(), model.calls)
                case "quit":
                    return
            pipe.send((True, answer))
        except Exception as e:
            pipe.send((False, f"{type(e).__name__}: {e}"))


class Worker:
    """The handle of a worker process; may be used from another process than the one that started it.

    One command at a time: a request that a failed update left behind may still wait for its answer in another thread.
    """

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self._asking = pipe, threading.Lock()

    def __reduce__(self) -> tuple[type[Worker], tuple[Connection]]:
        return Worker, (self.pipe,)

    def ask(self, *command: Any, seconds: float = 30.0) -> Any:
        """Raises RuntimeError with the worker's own error, or EOFError when it is dead."""
        with self._asking:
            self.pipe.send(command)
            if not self.pipe.poll(seconds):
                raise TimeoutError(f"the worker did not answer {command[0]} in {seconds} s")
            ok, answer = self.pipe.recv()
        if not ok:
            raise RuntimeError(answer)
        return answer

    def update(self, handle: str, orders: Orders = Orders()) -> list[str]:
        versions: list[str] = self.ask("update", handle, orders)
        return versions

    def state(self) -> tuple[str | None, bool, dict[str, str], list[list[str]]]:
        state: tuple[str | None, bool, dict[str, str], list[list[str]]] = self.ask("state")
        return state


@contextlib.contextmanager
def worker_processes(serve: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> Iterator[list[Worker]]:
    """A process for each of `arguments` that runs serve(pipe, environment, *arguments); killed at the end."""
    processes, pipes = [], []
    for each in arguments:
        mine, theirs = _context.Pipe()
        process = _context.Process(target=serve, args=(theirs, dict(os.environ), *each))
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(mine)
    try:
        yield [Worker(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
        for process, pipe in zip(processes, pipes, strict=True):
            process.join()
            process.close()
            pipe.close()


def workers(count: int, devices: int | None = None) -> contextlib.AbstractContextManager[list[Worker]]:
    """`count` worker processes, killed at the end; on a GPU, spread over `devices` of them."""
    return worker_processes(_worker, [(number % (devices or count),) for number in range(count)])


def request(worker: Worker | None, rank: int, orders: Orders = Orders()) -> Callable[[Handles], None]:
    """A req_func for `rank` whose replica is the one worker beside it."""

    def ask(handles: Handles) -> None:
        if worker is not None:
            worker.update(handles[rank][1], orders)

    return ask


def quick(**changes: Any) -> Settings:
    """Settings with deadlines that suit a test; broadcasting also where ranks of one host could do without."""
    deadlines = {"timeout": 20.0, "connect_timeout": 5.0, "join_timeout": 10.0}
    return Settings.from_environment(**{"map_regions": False, **deadlines, **changes})


@contextlib.contextmanager
def server(**changes: Any) -> Iterator[ParameterServer]:
    """A server of this process's rank; afterwards no thread of it may be left."""
    with ParameterServer(settings=quick(**changes)) as ps:
        yield ps
    left = [t.name for t in threading.enumerate() if t.name in ("links", "lift", "share", "session-listener", "pass")]
    if left:
        raise AssertionError(f"threads left: {left}")


DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.uint8,
]
SHAPES: Sequence[tuple[int, ...]] = [(), (0,), (1,), (3,), (5, 7), (64, 33), (128, 257), (2, 0, 3)]


def tensors(seed: int, layers: int = 6) -> dict[str, torch.Tensor]:
    """Deterministic tensors of many dtypes and odd shapes, named as a model's."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer in range(layers):
        for i, shape in enumerate(SHAPES):
            dtype = DTYPES[(layer + i) % len(DTYPES)]
            raw = torch.randint(0, 255, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
            if dtype == torch.bool:
                raw %= 2
            made[f"model.layers.{layer}.t{i}.weight"] = (
                raw.view(dtype).reshape(shape) if raw.numel() else torch.zeros(shape, dtype=dtype)
            )
    return made


def share_of(everything: dict[str, torch.Tensor], rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Every world_size-th tensor."""
    return {name: t for i, (name, t) in enumerate(everything.items()) if i % world_size == rank}


def digests(everything: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: digest(t) for name, t in everything.items()}
