"""What this host could do at best: the ceilings that a report's rates are fractions of.

One process per device, each a fresh interpreter that runs this module; they meet at a TCP store of the parent's and leave
their numbers there as JSON. Every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import datetime
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO

import msgspec
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from checkpoint_engine.devices.base import Device, SharedHandle, get_device
from checkpoint_engine.devices.rates import copy_rate, memcpy_rate
from checkpoint_engine.errors import DeadlineError, DeviceError, ProtocolError, SettingsError

MIB, GIB = 1 << 20, 1 << 30
PEER_BYTES = 256 * MIB


class BroadcastRate(msgspec.Struct, frozen=True):
    """rate: bytes of the message per second, however many ranks receive it."""

    nbytes: int
    rate: float


class Ceilings(msgspec.Struct, frozen=True, kw_only=True):
    """Rates in bytes/second, one per device where they are tuples.

    memcpy              one thread, host to host (read bytes, not read plus written)
    h2d_alone           host to device from registered memory, one device at a time; empty on a CPU
    h2d_together        all devices at once
    device_copy         within a device (read bytes)
    peer_copy           from each device into the next one's memory, all at once; empty for a single one, or without access
    broadcast           over all devices, by message size; empty for a single one
    communicator_bytes  device memory that the communicator of this measurement holds on rank 0
    register            registering touched host memory, one device at a time
    """

    host: str
    device: str
    names: tuple[str, ...]
    torch: str
    backend: str
    memcpy: float
    h2d_alone: tuple[float, ...] = ()
    h2d_together: tuple[float, ...] = ()
    device_copy: tuple[float, ...] = ()
    register: tuple[float, ...] = ()
    peer_copy: tuple[float, ...] = ()
    broadcast: tuple[BroadcastRate, ...] = ()
    communicator_bytes: int = 0

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


class _Task(msgspec.Struct, frozen=True):
    device: str
    rank: int
    ranks: int
    port: int
    sizes: tuple[int, ...]
    region_bytes: int
    seconds: float
    timeout: float


class _Part(msgspec.Struct):
    """What one rank found."""

    name: str = ""
    memcpy: float = 0.0
    h2d_alone: float = 0.0
    h2d_together: float = 0.0
    device_copy: float = 0.0
    register: float = 0.0
    peer_copy: float = 0.0
    broadcast: dict[int, float] = {}  # seconds per message
    communicator_bytes: int = 0


def probe(
    device: str | None = None,
    *,
    ranks: int | None = None,
    sizes: tuple[int, ...] | None = None,
    region_bytes: int | None = None,
    seconds: float = 0.5,
    timeout: float = 120.0,
) -> Ceilings:
    """Measure. About `seconds` for each kind of copy and device; `timeout` for all of it.

    device        "cuda" or "cpu"; None: cuda where there is one
    ranks         processes; None: one per visible GPU, two on a CPU
    sizes         of the broadcasts, bytes
    region_bytes  host memory per process

    Raises SettingsError, DeviceError with the last words of the process that failed, DeadlineError.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device == "cuda"
    visible = torch.cuda.device_count() if on_gpu else 2
    ranks = ranks or visible
    if device not in ("cpu", "cuda") or ranks < 1 or (on_gpu and ranks > visible):
        raise SettingsError(f"{ranks} x {device} cannot be probed here: there are {visible} visible devices")
    sizes = sizes or ((16 * MIB, 64 * MIB, 256 * MIB, GIB) if on_gpu else (16 * MIB, 64 * MIB))
    region_bytes = region_bytes or (2 * GIB if on_gpu else 128 * MIB)
    patience = datetime.timedelta(seconds=timeout)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
    tasks = [_Task(device, rank, ranks, store.port, sizes, region_bytes, seconds, timeout) for rank in range(ranks)]
    _run(tasks, timeout)
    parts = [msgspec.json.decode(store.get(f"part/{rank}"), type=_Part) for rank in range(ranks)]
    return _ceilings(device, parts)


def _run(tasks: list[_Task], timeout: float) -> None:
    """All processes to their end, and none left behind."""
    command = [sys.executable, "-m", "checkpoint_engine.devices.probe"]
    until = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        words, processes = [], []
        for task in tasks:
            words.append(stack.enter_context(tempfile.TemporaryFile()))  # unlike a pipe, never full
            text = msgspec.json.encode(task).decode()
            processes.append(subprocess.Popen([*command, text], stdin=subprocess.DEVNULL, stderr=words[-1]))
            stack.callback(_end, processes[-1])
        while True:
            codes = [process.poll() for process in processes]
            for rank, code in enumerate(codes):
                if code:
                    raise DeviceError(f"the probe of rank {rank}", code, _last_words(words[rank], code))
            if None not in codes:
                return
            if time.monotonic() > until:
                raise DeadlineError("the probe's processes", timeout)
            time.sleep(0.02)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _last_words(file: IO[bytes], code: int) -> str:
    file.seek(0)
    return (file.read().decode(errors="replace").strip().splitlines() or [f"exit code {code}, without a word"])[-1]


def _ceilings(device: str, parts: list[_Part]) -> Ceilings:
    gpu = device == "cuda"
    return Ceilings(
        host=socket.gethostname(),
        device=device,
        names=tuple(part.name for part in parts),
        torch=str(torch.__version__),
        backend="nccl" if gpu else "gloo",
        memcpy=parts[0].memcpy,
        h2d_alone=tuple(part.h2d_alone for part in parts) if gpu else (),
        h2d_together=tuple(part.h2d_together for part in parts) if gpu else (),
        device_copy=tuple(part.device_copy for part in parts) if gpu else (),
        register=tuple(part.register for part in parts) if gpu else (),
        peer_copy=tuple(part.peer_copy for part in parts) if all(part.peer_copy for part in parts) else (),
        broadcast=tuple(BroadcastRate(n, n / max(part.broadcast[n] for part in parts)) for n in parts[0].broadcast),
        communicator_bytes=parts[0].communicator_bytes,
    )


class _Rank:
    """One process of the probe."""

    def __init__(self, task: _Task) -> None:
        self.task, self.part = task, _Part()
        patience = datetime.timedelta(seconds=task.timeout)
        self.store = TCPStore("127.0.0.1", task.port, is_master=False, timeout=patience)
        self.patience, self._barriers = patience, 0
        self.device: Device = get_device(task.device, task.rank if task.device == "cuda" else 0)
        self.device.bind_thread()

    def barrier(self) -> None:
        self._barriers += 1
        key = f"barrier/{self._barriers}"
        if self.store.add(key, 1) == self.task.ranks:
            self.store.set(key + "/open", "1")
        self.store.wait([key + "/open"], self.patience)

    def in_turn(self, measure: Callable[[], float]) -> float:
        """Every rank alone, one after the other."""
        result = 0.0
        for rank in range(self.task.ranks):
            self.barrier()
            if rank == self.task.rank:
                result = measure()
        self.barrier()
        return result

    def run(self) -> None:
        task, part = self.task, self.part
        memory = host_memory(task.region_bytes)
        part.memcpy = self.in_turn(lambda: memcpy_rate(torch.ones_like(memory), memory, task.seconds / 2))
        part.name = torch.cuda.get_device_name(task.rank) if task.device == "cuda" else "cpu"
        if task.device == "cuda":
            self._copies(memory)
            if task.ranks > 1:
                self._peer_copies()
        if task.ranks > 1:
            self._broadcasts()
        self.store.set(f"part/{task.rank}", msgspec.json.encode(part).decode())
        self.barrier()  # the group's rank 0 must not leave while others still talk to it

    def _copies(self, memory: torch.Tensor) -> None:
        task, part, device = self.task, self.part, self.device
        start = time.perf_counter()
        with device.register_host(memory), device.allocate(memory.numel()) as target, device.stream("probe") as stream:
            part.register = memory.numel() / (time.perf_counter() - start)
            copy_rate(stream, target.tensor, memory, 0.0, task.timeout)  # warm
            part.h2d_alone = self.in_turn(lambda: copy_rate(stream, target.tensor, memory, task.seconds, task.timeout))
            part.h2d_together = copy_rate(stream, target.tensor, memory, task.seconds, task.timeout)
            self.barrier()
            half = memory.numel() // 2
            target_half, source_half = target.tensor[:half], target.tensor[half : 2 * half]
            part.device_copy = copy_rate(stream, target_half, source_half, task.seconds / 4, task.timeout)
            device.synchronize()

    def _peer_copies(self) -> None:
        task, device = self.task, self.device
        with device.allocate_ring(PEER_BYTES) as ring, device.stream("probe") as stream, contextlib.ExitStack() as opened:
            self.store.set(f"ring/{task.rank}", msgspec.json.encode(ring.share()[0]).decode())
            handle = self.store.get(f"ring/{(task.rank + 1) % task.ranks}")
            mapped = None
            with contextlib.suppress(ProtocolError, DeviceError):  # no access between these devices: nothing to measure
                mapped = opened.enter_context(device.open_peer(msgspec.json.decode(handle, type=SharedHandle), ())).tensor
            self.barrier()
            if mapped is not None:
                copy_rate(stream, mapped, ring.tensor, 0.0, task.timeout)  # warm
                self.part.peer_copy = copy_rate(stream, mapped, ring.tensor, task.seconds / 4, task.timeout)
            del mapped
            opened.close()
            self.barrier()  # nobody frees what another one has mapped

    def _broadcasts(self) -> None:
        """Warm up, then a fixed number of messages per size: every rank must make the same calls."""
        task, device = self.task, self.device
        gpu = torch.device("cuda", task.rank) if task.device == "cuda" else None
        free = device.free_bytes() if gpu else 0
        dist.init_process_group(
            device.backend, store=self.store, rank=task.rank, world_size=task.ranks, timeout=self.patience, device_id=gpu
        )
        try:
            message = torch.zeros(max(task.sizes), dtype=torch.uint8, device=gpu or "cpu")
            held = message.numel()
            for nbytes in task.sizes:
                part = message[:nbytes]
                count = max(2, min(32, (4 * GIB if gpu else 256 * MIB) // nbytes))
                for _ in range(2):
                    dist.broadcast(part, 0)
                device.synchronize()
                self.barrier()
                start = time.perf_counter()
                for _ in range(count):
                    dist.broadcast(part, 0)
                device.synchronize()
                self.part.broadcast[nbytes] = (time.perf_counter() - start) / count
            if gpu:
                self.part.communicator_bytes = max(0, free - device.free_bytes() - held)
            self.barrier()
        finally:
            dist.destroy_process_group()


def host_memory(nbytes: int) -> torch.Tensor:
    """A touched memfd mapping, as regions are."""
    descriptor = os.memfd_create("probe")
    try:
        os.ftruncate(descriptor, nbytes)
        memory = mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)
    return torch.frombuffer(memory, dtype=torch.uint8).fill_(7)


if __name__ == "__main__":
    _Rank(msgspec.json.decode(sys.argv[1].encode(), type=_Task)).run()
