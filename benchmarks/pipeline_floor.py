"""The floor: lift, share and load as a bare loop, the load in a second process per device. No manifest, no plan, no session.

    python benchmarks/pipeline_floor.py --gib 60 --slot-mib 64            # on GPUs
    python benchmarks/pipeline_floor.py --device cpu --gib 0.5            # a rehearsal

Bucket k is lifted by rank k % ranks, broadcast to all, and copied out of the shared slot by every rank's worker. Messages
between server and worker (a Unix socket) say that work HAS completed; nothing is queued behind another process's work.
Prints the best and median round and which fraction that is of the host-to-device rate measured in the same run, all
devices at once.
"""

from __future__ import annotations

import argparse
import datetime
import queue
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import msgspec
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from checkpoint_engine.devices import Device, Event, Ring, SharedHandle, Stream, get_device
from checkpoint_engine.devices.nccl import NcclCommunicator, unique_id
from checkpoint_engine.devices.probe import host_memory
from checkpoint_engine.devices.rates import copy_rate

MIB, GIB = 1 << 20, 1 << 30
TIMEOUT = 120.0
DONE, CHECK, QUIT = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD  # messages that are not bucket numbers


class Task(msgspec.Struct, frozen=True):
    """One run, as every process of it sees it. collective: "nccl" (our binding, out of place) or "torch"."""

    device: str
    ranks: int
    buckets: int
    slot: int
    staging: int
    slots: int
    region: int
    rounds: int
    collective: str
    max_ctas: int | None
    rank: int = 0
    port: int = 0


class Report(msgspec.Struct):
    seconds: list[float]
    lift: float  # of the last round: busy seconds of the lift stream
    h2d: float  # bytes per second, all at once
    held: int  # device bytes that this process took
    equal: bool


def cut(tensor: torch.Tensor, size: int) -> list[torch.Tensor]:
    return [tensor[start : start + size] for start in range(0, tensor.numel(), size)]


def pattern(rank: int) -> int:
    return 17 * rank + 11


class Share:
    """Broadcasts on the share stream, by either collective."""

    def __init__(self, task: Task, device: Device, store: TCPStore, stack: ExitStack) -> None:
        self.task = task
        self.own: NcclCommunicator | None = None
        patience = datetime.timedelta(seconds=TIMEOUT)
        if task.ranks == 1:
            return
        if task.collective == "nccl":
            if task.rank == 0:
                store.set("nccl", unique_id().hex())
            token = bytes.fromhex(store.get("nccl").decode())
            self.own = NcclCommunicator(token, task.rank, task.ranks, task.rank, timeout=TIMEOUT, max_ctas=task.max_ctas)
            stack.enter_context(self.own)
        else:
            bound = torch.device("cuda", task.rank) if task.device == "cuda" else None
            options = None
            if bound is not None:
                options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
                if task.max_ctas:
                    options.config.max_ctas = task.max_ctas
            dist.init_process_group(
                device.backend,
                store=store,
                rank=task.rank,
                world_size=task.ranks,
                timeout=patience,
                device_id=bound,
                pg_options=options,
            )
            stack.callback(dist.destroy_process_group)

    def __call__(self, stream: Stream, slot: torch.Tensor, staged: torch.Tensor | None, owner: int) -> None:
        """`staged`: what the owner lifted; None on the other ranks, and where it was lifted into the slot itself."""
        if self.own is not None:
            source = slot if staged is None else staged
            self.own.broadcast(slot, source, owner, stream.raw.cuda_stream, timeout=TIMEOUT)  # type: ignore[attr-defined]
            return
        if staged is not None and staged is not slot:
            stream.copy(slot, staged)
        if self.task.ranks > 1:
            stream.call(lambda: (dist.broadcast(slot, owner), None)[1])


class Server:
    """One rank: lifts its buckets, shares all, tells the worker, and learns from it which slots are free."""

    def __init__(self, task: Task, device: Device, ring: Ring, staging: Ring, channel: socket.socket, share: Share) -> None:
        self.task, self.device, self.ring, self.channel, self.share = task, device, ring, channel, share
        self.lift_stream, self.share_stream = device.stream("lift"), device.stream("share")
        self.slots = cut(ring.tensor, task.slot)
        self.staging = cut(staging.tensor, task.slot)
        self.loaded = 0  # buckets the worker has copied, in order
        self.change = threading.Condition()
        self.shared: queue.SimpleQueue[tuple[int, Event] | None] = queue.SimpleQueue()
        self.failed: BaseException | None = None
        self.edges: list[tuple[Event, Event]] = []
        for work in (self.notify, self.listen):
            threading.Thread(target=self.guarded, args=(work,), daemon=True).start()

    def guarded(self, work: object) -> None:
        try:
            self.device.bind_thread()
            work()  # type: ignore[operator]
        except BaseException as e:  # handed to the main thread
            with self.change:
                self.failed = e
                self.change.notify_all()

    def notify(self) -> None:
        while (entry := self.shared.get()) is not None:
            if not entry[1].wait(TIMEOUT):
                raise TimeoutError(f"bucket {entry[0]} was not shared in {TIMEOUT} s")
            send(self.channel, entry[0])

    def listen(self) -> None:
        while (number := receive(self.channel)) is not None:
            with self.change:
                self.loaded = number + 1
                self.change.notify_all()

    def wait_loaded(self, count: int) -> None:
        with self.change:
            if not self.change.wait_for(lambda: self.loaded >= count or self.failed is not None, TIMEOUT):
                raise TimeoutError(f"the worker had loaded {self.loaded} buckets, not {count}, after {TIMEOUT} s")
            if self.failed is not None:
                raise self.failed

    def lift(self, number: int, region: torch.Tensor, freed: Event | None) -> tuple[torch.Tensor, Event]:
        """Queue the lift of this rank's bucket number `number`, once the broadcast that used the staging slot is done."""
        task = self.task
        staged = self.staging[number % task.staging]
        start = number * task.slot % (region.numel() - task.slot + 1)
        if freed is not None:
            self.lift_stream.after(freed)
        since = self.lift_stream.record()
        self.lift_stream.copy(staged, region[start : start + task.slot])
        until = self.lift_stream.record()
        self.edges.append((since, until))
        return staged, until

    def round(self, region: torch.Tensor) -> float:
        """Seconds for all buckets, until the last is loaded here."""
        task, start = self.task, time.perf_counter()
        self.edges.clear()
        self.loaded = 0
        mine = len(range(task.rank, task.buckets, task.ranks))
        lifted = [self.lift(number, region, None) for number in range(min(mine, task.staging))]
        for k in range(task.buckets):
            self.wait_loaded(k + 1 - task.slots)
            slot, staged = self.slots[k % task.slots], None
            number = k // task.ranks
            if owner_is_me := k % task.ranks == task.rank:
                staged, ready = lifted[number]
                self.share_stream.after(ready)
            self.share(self.share_stream, slot, staged, k % task.ranks)
            event = self.share_stream.record()
            self.shared.put((k, event))
            if owner_is_me and number + task.staging < mine:
                lifted.append(self.lift(number + task.staging, region, event))
        self.wait_loaded(task.buckets)
        return time.perf_counter() - start

    def lift_seconds(self) -> float:
        return sum(self.lift_stream.busy(since, until) for since, until in self.edges)


def send(channel: socket.socket, number: int) -> None:
    channel.sendall(struct.pack("<I", number))


def receive(channel: socket.socket) -> int | None:
    """The next message; None at the end of the stream."""
    data = b""
    while len(data) < 4:
        if not (part := channel.recv(4 - len(data))):
            return None
        data += part
    return int(struct.unpack("<I", data)[0])


def barrier(store: TCPStore, key: str, ranks: int) -> None:
    if store.add(key, 1) == ranks:
        store.set(key + "/open", "1")
    store.wait([key + "/open"], datetime.timedelta(seconds=TIMEOUT))


@contextmanager
def worker_process(task: Task, ring: Ring) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    ours, theirs = socket.socketpair()
    command = [sys.executable, __file__, "--worker", msgspec.json.encode(task).decode(), str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    try:
        theirs.close()
        handle, descriptors = ring.share()
        ours.settimeout(TIMEOUT)
        if descriptors:
            socket.send_fds(ours, [msgspec.json.encode(handle)], list(descriptors))
        else:
            ours.send(msgspec.json.encode(handle))
        if receive(ours) != DONE:
            raise RuntimeError("the worker could not map the ring")
        yield ours, process
    finally:
        with suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)  # closing alone would not reach the worker while a thread of ours is reading
        ours.close()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()


def serve(task: Task) -> None:
    device = get_device(task.device, task.rank if task.device == "cuda" else 0)
    device.bind_thread()
    store = TCPStore("127.0.0.1", task.port, is_master=False, timeout=datetime.timedelta(seconds=TIMEOUT))
    region = host_memory(task.region).fill_(pattern(task.rank))
    with ExitStack() as stack:
        stack.enter_context(device.register_host(region))
        ring = stack.enter_context(device.allocate_ring(task.slots * task.slot))
        staging = stack.enter_context(device.allocate(task.staging * task.slot))
        channel, _ = stack.enter_context(worker_process(task, ring))
        free = device.free_bytes()  # the worker has taken all it takes; from here on it is the server's
        server = Server(task, device, ring, staging, channel, Share(task, device, store, stack))
        seconds = []
        for number in range(task.rounds + 1):  # the first one connects the ranks and counts for nothing
            barrier(store, f"round/{number}", task.ranks)
            seconds.append(server.round(region))
        held = (task.slots + task.staging) * task.slot + (free - device.free_bytes() if task.device == "cuda" else 0)
        barrier(store, "h2d", task.ranks)
        h2d = copy_rate(server.lift_stream, staging.tensor[: task.slot], region[: task.slot], 0.5, TIMEOUT)
        server.shared.put((CHECK, server.share_stream.record()))
        server.wait_loaded(QUIT)  # its answer to CHECK: QUIT when all is right
        report = Report(seconds[1:], server.lift_seconds(), h2d, held, server.loaded == QUIT + 1)
        store.set(f"report/{task.rank}", msgspec.json.encode(report).decode())
        barrier(store, "end", task.ranks)
        server.shared.put(None)


def work(task: Task, descriptor: int) -> None:
    """The engine's side: copies every bucket out of its slot, and says so when the copy is done."""
    device = get_device(task.device, task.rank if task.device == "cuda" else 0)
    device.bind_thread()
    channel = socket.socket(fileno=descriptor)
    data, descriptors, _, _ = socket.recv_fds(channel, 4096, 1)
    handle = msgspec.json.decode(data, type=SharedHandle)
    keep = min(task.buckets, max(1, min(4 * GIB, device.free_bytes() // 2) // task.slot))
    with device.open_ring(handle, tuple(descriptors)) as mapping, device.stream("load") as stream:
        slots = cut(mapping.tensor, task.slot)
        with device.allocate(keep * task.slot) as parameters:
            places = cut(parameters.tensor, task.slot)
            send(channel, DONE)
            while (k := receive(channel)) is not None:
                if k == CHECK:
                    last = range(max(0, task.buckets - keep), task.buckets)
                    good = all(bool((places[i % keep] == pattern(i % task.ranks)).all()) for i in last)
                    send(channel, QUIT if good else DONE)
                    continue
                stream.copy(places[k % keep], slots[k % task.slots])
                if not stream.record().wait(TIMEOUT):
                    raise TimeoutError(f"bucket {k} was not loaded in {TIMEOUT} s")
                send(channel, k)
            device.synchronize()
            del slots


def run(task: Task) -> list[Report]:
    """All ranks to the end, none left behind."""
    patience = datetime.timedelta(seconds=TIMEOUT)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
    processes = []
    try:
        for rank in range(task.ranks):
            mine = msgspec.structs.replace(task, rank=rank, port=store.port)
            processes.append(subprocess.Popen([sys.executable, __file__, "--server", msgspec.json.encode(mine).decode()]))
        until = time.monotonic() + 2 * TIMEOUT + task.rounds * TIMEOUT
        while (codes := [process.poll() for process in processes]).count(0) < task.ranks:
            if any(codes) or time.monotonic() > until:
                raise SystemExit(f"the servers' exit codes: {codes}")
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [msgspec.json.decode(store.get(f"report/{rank}"), type=Report) for rank in range(task.ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--ranks", type=int, help="default: all GPUs; 2 on a CPU")
    parser.add_argument("--gib", type=float, default=60.0, help="bytes in all, over all ranks")
    parser.add_argument("--slot-mib", type=float, default=64.0)
    parser.add_argument("--staging", type=int, default=2, help="slots to lift into")
    parser.add_argument("--slots", type=int, default=3, help="slots shared with the worker")
    parser.add_argument("--region-gib", type=float, help="host memory per rank, read round and round; default: 4, 0.25 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--collective", choices=("nccl", "torch"), help="default: nccl on GPUs")
    parser.add_argument("--max-ctas", type=int, help="channels of the communicator at most")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    gpu = arguments.device == "cuda"
    slot = int(arguments.slot_mib * MIB)
    buckets = max(1, round(arguments.gib * GIB / slot))
    task = Task(
        device=arguments.device,
        ranks=arguments.ranks or (torch.cuda.device_count() if gpu else 2),
        buckets=buckets,
        slot=slot,
        staging=arguments.staging,
        slots=arguments.slots,
        region=max(slot, int((arguments.region_gib or (4 if gpu else 0.25)) * GIB)),
        rounds=arguments.rounds,
        collective=(arguments.collective or "nccl") if gpu else "torch",
        max_ctas=arguments.max_ctas,
    )
    reports = run(task)
    seconds = [max(each) for each in zip(*(report.seconds for report in reports), strict=True)]
    total, limit = buckets * slot, sum(report.h2d for report in reports)
    best, median = min(seconds), statistics.median(seconds)
    result = {
        "device": task.device,
        "ranks": task.ranks,
        "collective": task.collective,
        "bytes": total,
        "slot_bytes": slot,
        "slots": [task.staging, task.slots],
        "seconds": [round(each, 4) for each in seconds],
        "best_rate": total / best,
        "median_rate": total / median,
        "h2d_limit": limit,
        "fraction_of_h2d": total / median / limit,
        "lift_busy_seconds": [round(report.lift, 4) for report in reports],
        "held_bytes": max(report.held for report in reports),
        "equal": all(report.equal for report in reports),
    }
    if arguments.json:
        print(msgspec.json.encode(result).decode())
    else:
        print(
            f"{task.ranks} x {task.device} ({task.collective}), {total / GIB:.2f} GiB in slots of {slot / MIB:g} MiB"
            f" ({task.staging} to lift, {task.slots} to share): best {best:.4f} s, median {median:.4f} s ="
            f" {total / median / 1e9:.1f} GB/s, {result['fraction_of_h2d']:.3f} of the H2D limit ({limit / 1e9:.1f} GB/s)\n"
            f"rounds {result['seconds']}, lift stream busy {result['lift_busy_seconds']} s,"
            f" {int(result['held_bytes']) / MIB:.0f} MiB of device memory held, equal: {result['equal']}"
        )
    if not result["equal"]:
        raise SystemExit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--server"]:
        serve(msgspec.json.decode(sys.argv[2].encode(), type=Task))
    elif sys.argv[1:2] == ["--worker"]:
        work(msgspec.json.decode(sys.argv[2].encode(), type=Task), int(sys.argv[3]))
    else:
        main()
