"""Updates in a row, and whether anything grows: memory, file descriptors, shared memory, threads.

    python -m benchmarks.soak [--updates 1000] [--ranks 8] [--engines 3] [--method mapped|copies|broadcast] [--json]

RANKS parameter servers register, gather and update a small model UPDATES times, each time with other bytes, into ENGINES
embedded engines, over which the ranks are spread as evenly as can be: an engine has as many workers, each a process. To every
engine a client sends one request after the other all the while, and every answer counts. At eleven points, all servers rest
while each process is measured by what the kernel says of it. Prints the first, a middle and the last measurement of each
kind of process, those that matter added up, and exits with 1 when something grew, or a request failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 600.0
"""Deadline of each step, beyond which something hangs."""
POINTS = 11
RSS_BYTES = 4 << 20
"""By how much a process's own memory may differ between two thirds of a run without having grown: what an allocator keeps."""
METHODS = {
    "mapped": {},
    "copies": {"CHECKPOINT_ENGINE_MAP_REGIONS": "0"},
    "broadcast": {"CHECKPOINT_ENGINE_MAP_REGIONS": "0", "CHECKPOINT_ENGINE_PEER_COPIES": "0"},
}
_context = multiprocessing.get_context("forkserver")


class Measured(NamedTuple):
    """One process. own_bytes: memory that no other process has mapped too; memfds: descriptors of shared memory, and
    memfd_bytes: of what is behind them."""

    own_bytes: int
    descriptors: int
    memfds: int
    memfd_bytes: int
    threads: int


def measure(pid: int) -> Measured:
    """As the kernel sees it. Raises OSError when the process is gone."""
    proc = Path(f"/proc/{pid}")
    rollup = dict(line.split(":", 1) for line in (proc / "smaps_rollup").read_text().splitlines()[1:])
    own = sum(int(rollup[key].split()[0]) for key in ("Private_Clean", "Private_Dirty")) << 10
    descriptors = memfds = nbytes = 0
    for entry in (proc / "fd").iterdir():
        try:
            target, status = os.readlink(entry), entry.stat()
        except FileNotFoundError:  # closed meanwhile
            continue
        descriptors += 1
        if target.startswith("/memfd:"):
            memfds += 1
            nbytes += status.st_size
    threads = len(list((proc / "task").iterdir()))
    return Measured(own, descriptors, memfds, nbytes, threads)


@dataclasses.dataclass(frozen=True)
class Point:
    """What all processes had when `updates` were done. by_process: "server 0", "engine 1" ... -> what the kernel said."""

    updates: int
    seconds: float
    by_process: dict[str, Measured]

    def total(self, kind: str) -> Measured:
        of_kind = [m for name, m in self.by_process.items() if name.startswith(kind)]
        return Measured(*(sum(values) for values in zip(*of_kind, strict=True)))


@dataclasses.dataclass(frozen=True)
class Result:
    """answers: status of each request -> how often."""

    points: list[Point]
    answers: dict[int, int]
    method: str

    def grown(self) -> list[str]:
        """What is larger in all of the last third of the run than in all of the middle third. Empty: nothing grew."""
        found = []
        settled = self.points[len(self.points) // 3 :]
        earlier, later = settled[: len(settled) // 2], settled[len(settled) // 2 :]
        for process in self.points[0].by_process:
            for field in Measured._fields:
                before = [getattr(point.by_process[process], field) for point in earlier]
                after = [getattr(point.by_process[process], field) for point in later]
                slack = RSS_BYTES if field == "own_bytes" else 0
                if min(after) > max(before) + slack:
                    found.append(f"{process}: {field} from {max(before)} to {min(after)}")
        return found

    @property
    def failed_requests(self) -> int:
        return sum(count for status, count in self.answers.items() if status != 200)


@dataclasses.dataclass(frozen=True)
class Task:
    """engines: URL and ranks of each."""

    updates: int
    world_size: int
    engines: tuple[tuple[str, tuple[int, ...]], ...]
    environment: dict[str, str]


# --- what runs in processes of its own ----------------------------------------------------------------------------------


def _server(rank: int, task: Task, pipe: Connection) -> None:
    os.environ.update(task.environment)
    import torch

    from checkpoint_engine import ParameterServer
    from checkpoint_engine.engines import get_engine

    torch.set_num_threads(1)
    shapes = {name: tensor.shape for name, tensor in _model().state_dict().items()}
    mine = list(shapes)[rank :: task.world_size]
    url, ranks = next((url, ranks) for url, ranks in task.engines if rank in ranks)
    marks = {task.updates * point // (POINTS - 1) for point in range(1, POINTS)} | {1}
    method = ""
    with ParameterServer(rank=rank, world_size=task.world_size) as ps, get_engine("sglang", url) as engine:
        for number in range(1, task.updates + 1):
            generator = torch.Generator().manual_seed(number)
            version = f"step-{number}"

            def ask(handles: list[tuple[str, str]], version: str = version) -> None:
                if rank == ranks[0]:
                    engine.update([handles[r] for r in ranks], version=version, seconds=SECONDS)

            tensors = {name: torch.randn(shapes[name], generator=generator) for name in mine}
            ps.register_checkpoint("step", named_tensors=tensors, use_shared_memory_pool=True)
            ps.gather_metas("step")
            method = ps.update("step", ask, version=version).method
            ps.unregister_checkpoint("step")
            if number in marks and rank == 0:  # the others wait for this rank to gather
                pipe.send(("rests", number))
                pipe.recv()
        ps.store_based_barrier()  # nobody ends while the last measurement is made
        pipe.send(("ends", method))


def _model() -> Any:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=32,
    )  # fmt: skip
    return BertModel(config)


def _engine(arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    from checkpoint_engine.cli import run

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until this process ends)
    sys.exit(run(["engine", *arguments]))


def _client(urls: Sequence[str], pipe: Connection) -> None:
    """Asks each engine, one request after the other, until it hears a word; sends how often which status came."""
    import httpx

    counts: Counter[int] = Counter()
    ended = threading.Event()

    def ask(url: str) -> None:
        numbers = random.Random(url)
        with httpx.Client(trust_env=False, timeout=SECONDS) as client:
            while not ended.is_set():
                inputs = [[numbers.randrange(256) for _ in range(8)]]
                counts[client.post(f"{url}/embed", json={"input": inputs}).status_code] += 1
                ended.wait(0.005)  # else the client has the core that the servers need

    threads = [threading.Thread(target=ask, args=(url,)) for url in urls]
    for thread in threads:
        thread.start()
    pipe.recv()
    ended.set()
    for thread in threads:
        thread.join(SECONDS)
    pipe.send(dict(counts))


# --- the run ------------------------------------------------------------------------------------------------------------


def soak(
    updates: int, ranks: int, engines: int, method: str = "mapped", tell: Callable[[Point], None] = lambda _: None
) -> Result:
    """Raises RuntimeError when a process ends with an error, TimeoutError when a step takes longer than SECONDS."""
    _context.set_forkserver_preload(["torch", "httpx", "transformers.models.bert.modeling_bert"])
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    os.environ.update(one_thread)  # of the fork server: others would not survive its forks
    groups = [tuple(range(ranks))[n * ranks // engines : (n + 1) * ranks // engines] for n in range(engines)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        environment = {
            "CHECKPOINT_ENGINE_DEVICE": "cpu",
            "CHECKPOINT_ENGINE_SOCKET_DIR": str(folder / "sockets"),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_ports()),
            **METHODS[method],
        }
        _model().save_pretrained(folder / "model")
        processes: dict[str, ForkServerProcess] = {}
        stack.callback(_end, processes)
        urls = [_start_engine(processes, folder, environment, n, len(group)) for n, group in enumerate(groups)]
        task = Task(updates, ranks, tuple(zip(urls, groups, strict=True)), environment)
        clients, theirs = _context.Pipe()
        processes["client"] = _start(_client, urls, theirs)
        pipes = []
        for rank in range(ranks):
            mine, theirs = _context.Pipe()
            pipes.append(mine)
            processes[f"server {rank}"] = _start(_server, rank, task, theirs)
            theirs.close()
        points, said = _follow(processes, pipes, tell)
        clients.send("end")
        if not clients.poll(SECONDS):
            raise TimeoutError("the clients do not end")
        return Result(points, clients.recv(), said)


def _start(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    process = _context.Process(target=function, args=arguments)
    process.start()
    return process


def _start_engine(
    processes: dict[str, ForkServerProcess], folder: Path, environment: dict[str, str], number: int, workers: int
) -> str:
    """Its URL. The workers behind the first are followers of it."""
    followers: list[str] = []
    for worker in reversed(range(workers)):
        file = folder / f"engine-{number}-{worker}"
        arguments = [str(folder / "model"), "--load-format", "dummy", "--threads", "1", "--port-file", str(file)]
        for follower in followers if worker == 0 else ():
            arguments += ["--follower", follower]
        name = f"engine {number}.{worker}"
        processes[name] = _start(_engine, arguments, environment)
        deadline = time.monotonic() + SECONDS
        while not file.exists():
            if not processes[name].is_alive() or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start (exit code {processes[name].exitcode})")
            time.sleep(0.05)
        followers.insert(0, file.read_text())
    return followers[0]


def _follow(
    processes: dict[str, ForkServerProcess], pipes: list[Connection], tell: Callable[[Point], None]
) -> tuple[list[Point], str]:
    points: list[Point] = []
    start = time.monotonic()
    running, method = set(pipes), ""
    while running:
        if not (ready := wait(running, SECONDS)):
            raise TimeoutError(f"no word from the servers for {SECONDS:g} s")
        for pipe in ready:
            try:
                what, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise RuntimeError(f"server {pipes.index(pipe)} died; its last words are above") from None  # type: ignore[arg-type]
            if what == "ends":
                running.discard(pipe)  # type: ignore[arg-type]
                method = value
                continue
            settled = {name: process for name, process in processes.items() if name != "client" and process.pid}
            points.append(
                Point(value, time.monotonic() - start, {n: measure(p.pid) for n, p in settled.items()})  # type: ignore[arg-type]
            )
            tell(points[-1])
            pipe.send("go on")  # type: ignore[union-attr]
    return points, method


def _free_ports() -> int:
    """Two neighbours below those that the kernel gives to outgoing connections."""
    import socket

    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(first // 2, first - 2)
        with ExitStack() as stack:
            try:
                for number in (port, port + 1):
                    stack.enter_context(socket.socket()).bind(("", number))
            except OSError:
                continue
            return port


def _end(processes: dict[str, ForkServerProcess]) -> None:
    for process in processes.values():
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        process.close()


# --- telling --------------------------------------------------------------------------------------------------------------


def show(result: Result) -> None:
    points = [result.points[0], result.points[len(result.points) // 2], result.points[-1]]
    print(f"\nmethod {result.method}; requests answered: {result.answers}")
    print(f"{'after updates':22}" + "".join(f"{point.updates:>12}" for point in points))
    print(f"{'seconds':22}" + "".join(f"{point.seconds:12.1f}" for point in points))
    for kind in ("server", "engine"):
        for field, name, unit in (
            ("own_bytes", "own memory, MiB", 1 << 20),
            ("descriptors", "descriptors", 1),
            ("memfds", "memfds", 1),
            ("memfd_bytes", "their bytes, MiB", 1 << 20),
            ("threads", "threads", 1),
        ):
            values = [getattr(point.total(kind), field) / unit for point in points]
            print(f"{f'{kind}s: {name}':28}" + "".join(f"{value:12.1f}" for value in values)[6:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--engines", type=int, default=3)
    parser.add_argument("--method", choices=METHODS, default="mapped")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not 1 <= arguments.engines <= arguments.ranks or arguments.updates < POINTS:
        parser.error(f"every engine needs a rank, and {POINTS} updates are the least")

    def tell(point: Point) -> None:
        servers, engines = point.total("server"), point.total("engine")
        print(f"{point.updates} updates, {point.seconds:.0f} s: servers {servers}, engines {engines}", file=sys.stderr)

    result = soak(arguments.updates, arguments.ranks, arguments.engines, arguments.method, tell)
    grown = result.grown()
    if arguments.json:
        print(json.dumps({"points": [dataclasses.asdict(p) for p in result.points], "answers": result.answers, "grown": grown}))
    else:
        show(result)
        per_update = result.points[-1].seconds / arguments.updates
        print(f"{per_update:.3f} s for each update, registering included")
        print("\n".join(["grown:", *grown]) if grown else "nothing grew")
    sys.exit(1 if grown or result.failed_requests else 0)


if __name__ == "__main__":
    main()
