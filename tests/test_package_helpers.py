"""The helpers tell the truth: a rank that fails, dies or stalls fails the test, and what is left behind is seen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from helpers.leaks import SHM_PREFIX, Watch
from helpers.ports import all_free, free_ports
from helpers.ranks import RanksFailed, run_ranks, start_ranks


def whoami(rank: int, world_size: int, word: str) -> tuple[int, int, str, str, str]:
    return rank, world_size, word, os.environ["RANK"], os.environ["EXTRA"]


def fails_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("one is odd")


def dies_on_one(rank: int, world_size: int) -> int:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return rank


def stalls_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        threading.Event().wait()


def test_results_come_in_rank_order() -> None:
    env = {"EXTRA": "for all"}
    results = run_ranks(whoami, 2, "word", env=env, env_of=lambda rank: {"EXTRA": "for one"} if rank else {})
    assert results == [(0, 2, "word", "0", "for all"), (1, 2, "word", "1", "for one")]


def test_an_exception_comes_with_its_traceback() -> None:
    with pytest.raises(RanksFailed, match="ValueError: one is odd") as caught:
        run_ranks(fails_on_one, 2)
    assert list(caught.value.tracebacks) == [1]


def test_a_death_is_told_unless_it_was_expected() -> None:
    with pytest.raises(RanksFailed, match="exit code -9"):
        run_ranks(dies_on_one, 2)
    assert run_ranks(dies_on_one, 2, may_die={1}) == [0, None]


def test_a_stalled_rank_is_killed() -> None:
    with start_ranks(stalls_on_one, 2) as ranks:
        stalled = ranks.processes[1].pid
        with pytest.raises(RanksFailed, match="no result after 1 s") as caught:
            ranks.results(1)
        assert list(caught.value.tracebacks) == [1]
    assert stalled is not None
    with pytest.raises(ProcessLookupError):
        os.kill(stalled, 0)


def test_what_is_left_behind_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.leaks.SECONDS", 0.1)
    watch = Watch(tmp_path)
    assert watch.leaks() == []
    (tmp_path / "left.sock").touch()
    shm = Path("/dev/shm") / f"{SHM_PREFIX}left"
    shm.touch()
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="left-thread")
    thread.start()
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    try:
        found = "\n".join(watch.leaks())
    finally:
        done.set()
        thread.join()
        shm.unlink()
        child.wait()  # it was killed as a leak
    for name in ("left.sock", shm.name, "left-thread", f"process {child.pid}"):
        assert name in found


def test_ports_are_neighbours_and_given_once() -> None:
    first, second = free_ports(2), free_ports(2)
    assert not {first, first + 1} & {second, second + 1}
    assert all_free(range(first, first + 2))
