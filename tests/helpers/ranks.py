"""N real processes that run one function, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from helpers.netns import Host
from helpers.ports import free_ports

# A child is a fork of a process that has done nothing but import these: torch takes seconds to import.
PRELOAD = ["torch", "torch.distributed", "zmq", "msgspec", "xxhash", "helpers.ranks"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


class RanksFailed(AssertionError):
    """At least one rank raised, died or was too slow. tracebacks: rank -> text."""

    def __init__(self, tracebacks: dict[int, str]) -> None:
        self.tracebacks = tracebacks
        super().__init__("\n" + "\n".join(f"--- rank {rank}\n{text}" for rank, text in sorted(tracebacks.items())))


class Ranks:
    """The running processes of `start_ranks`. A context manager: leaving it kills what still runs."""

    def __init__(self, processes: list[ForkServerProcess], pipes: list[Connection], may_die: frozenset[int]) -> None:
        self.processes, self._pipes, self._may_die = processes, pipes, may_die

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self._pipes, strict=True):
            process.join()
            process.close()
            pipe.close()

    def kill(self, rank: int, sig: int = signal.SIGKILL) -> None:
        """Send `sig` to a rank; name it in `may_die` to have its death count as a result (None)."""
        pid = self.processes[rank].pid
        if pid is not None:
            os.kill(pid, sig)

    def results(self, timeout: float = 50.0) -> list[Any]:
        """What each rank returned, in rank order; None for a rank that died and was allowed to.

        Raises RanksFailed with every child's traceback, or with where it stood still after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        results: list[Any] = [None] * len(self.processes)
        failed: dict[int, str] = {}
        waiting = dict(zip(self._pipes, range(len(self._pipes)), strict=True))
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    self.processes[rank].join(max(0.0, deadline - time.monotonic()))
                    if rank not in self._may_die:
                        failed[rank] = f"died with exit code {self.processes[rank].exitcode}"
                    continue
                if ok:
                    results[rank] = value
                else:
                    failed[rank] = value
        for rank in waiting.values():
            failed[rank] = f"no result after {timeout:g} s"
        if failed:
            raise RanksFailed(failed)
        for process in self.processes:
            process.join(max(1.0, deadline - time.monotonic()))
            if process.exitcode is None:
                raise RanksFailed({self.processes.index(process): "returned, but its process does not end (a thread is left)"})
        return results


def start_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    env: Mapping[str, str] | None = None,
    env_of: Callable[[int], Mapping[str, str]] | None = None,
    hosts: Sequence[Host] | None = None,
    may_die: Collection[int] = (),
    master_port: int | None = None,
) -> Ranks:
    """Start `fn(rank, world_size, *args)` in `world_size` processes with RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT set. `fn` and `args` are pickled: `fn` is a function of a test module.

    env      further variables of every rank; env_of(rank): of one rank
    hosts    spread the ranks evenly over these network namespaces, as consecutive ranks
    may_die  ranks whose death is no failure
    """
    hosts = list(hosts or ())
    local = world_size // len(hosts) if hosts else world_size
    port = master_port if master_port is not None else free_ports()
    processes, pipes = [], []
    for rank in range(world_size):
        host = hosts[rank // local] if hosts else None
        variables = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank % local),
            "LOCAL_WORLD_SIZE": str(local),
            "MASTER_ADDR": hosts[0].address if hosts else "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            **(env or {}),
            **(env_of(rank) if env_of else {}),
        }
        mine, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=_child, args=(theirs, fn, rank, world_size, args, variables, host), daemon=False)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(mine)
    return Ranks(processes, pipes, frozenset(may_die))


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 50.0, **options: Any) -> list[Any]:
    """`start_ranks`, then `Ranks.results`: what each rank returned, in rank order."""
    with start_ranks(fn, world_size, *args, **options) as ranks:
        return ranks.results(timeout)


def _child(
    pipe: Connection,
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    variables: dict[str, str],
    host: Host | None,
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    try:
        if host is not None:
            host.enter()
        result = (True, fn(rank, world_size, *args))
    except BaseException:
        result = (False, traceback.format_exc())
    try:
        pipe.send(result)
    except Exception:  # the result cannot be pickled: say which, instead of dying mutely
        pipe.send((False, f"result {result[1]!r} of rank {rank} cannot be sent\n{traceback.format_exc()}"))
    pipe.close()
