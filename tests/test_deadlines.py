"""Deadlines reach every wait of an update, and news of a failure reaches every rank at once."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint_engine.engines.sglang import SGLang
from checkpoint_engine.errors import DeadlineError, UpdateError
from checkpoint_engine.transport.session import prepare_directory
from helpers.fleet import Handles, Orders, Worker, quick, request, server, share_of, tensors, workers
from helpers.ranks import Ranks, run_ranks, start_ranks

SMALL = {"bucket_bytes": 64 << 10}


@pytest.fixture
def dripping() -> Iterator[str]:
    """An engine that sends its answer byte by byte, and never all of it."""
    ended = threading.Event()

    def drip() -> None:
        with listener.accept()[0] as client:
            client.recv(4096)
            client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
            while not ended.wait(0.02):
                try:
                    client.sendall(b" ")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        ended.set()
        thread.join(10)


def test_an_answer_that_does_not_end(dripping: str) -> None:
    with SGLang(dripping) as engine, pytest.raises(DeadlineError, match="to answer POST /continue_generation"):
        engine.resume(0.3)


def _one_stands_still(rank: int, world_size: int, crew: list[Worker], method: str) -> Any:
    """The settings leave ten minutes; the call does not."""

    def progress(nbytes: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    patient = {"timeout": 600.0, "attach_timeout": 600.0, "stop_timeout": 0.5, "peer_copies": method == "copies"}
    with server(**SMALL, **patient, ring_bytes=64 << 10) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(UpdateError) as caught:
            ps.update("c", request(crew[rank], rank), timeout=datetime.timedelta(seconds=2), progress=progress)
        return str(caught.value)


@pytest.mark.parametrize("method", ["copies", "broadcast"])
def test_the_deadline_of_a_call_reaches_every_broadcast(method: str) -> None:
    with workers(3) as crew, start_ranks(_one_stands_still, 3, crew, method, may_die=[1]) as ranks:
        texts = _of_others(ranks)
    prepare_directory(quick())  # sweeps what the killed rank left
    assert all("gave up after 2 s waiting for" in text for text in texts), texts


def _of_others(ranks: Ranks) -> list[str]:
    """What ranks 0 and 2 return while rank 1 is stopped."""
    for rank in (0, 2):
        assert ranks._pipes[rank].poll(30)
    ranks.kill(1)
    results = ranks.results()
    return [results[0], results[2]]


def _learns(rank: int, world_size: int, crew: list[Worker], mark: str, what: str) -> float:
    """Seconds from the failure on rank 1 to its error here."""

    def ask(handles: Handles) -> None:
        if rank == 1 and what == "request":
            Path(mark).write_text(str(time.monotonic()))
            raise ConnectionError("no engine")
        crew[rank].update(handles[rank][1], Orders(raise_in_bucket=3 if rank == 1 and what == "load" else None))

    def progress(nbytes: int) -> None:
        if rank == 1 and what == "server":
            Path(mark).write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and what == "load":  # the last one before the worker raises
            Path(mark).write_text(str(time.monotonic()))

    with server(**SMALL) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(UpdateError, match="rank 1"):
            ps.update("c", ask, progress=progress)
        return time.monotonic() - float(Path(mark).read_text())


@pytest.mark.parametrize("what", ["request", "load", "server"])
def test_news_of_a_failure_reach_all_ranks(what: str, tmp_path: Path) -> None:
    """The goal is 1 s on a healthy host; measured and printed (pytest -s), and bounded by the deadlines of these calls."""
    with workers(3) as crew:
        seconds = run_ranks(_learns, 3, crew, str(tmp_path / "mark"), what, may_die=[1] if what == "server" else [])
    prepare_directory(quick())
    seen = [each for each in seconds if each is not None]
    print(f"\n{what} fails: all ranks have the error after {max(seen):.3f} s")
    assert max(seen) < 20
