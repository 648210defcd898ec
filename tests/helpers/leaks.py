"""What a test must not leave behind: processes, files in /dev/shm, sockets in the socket directory, threads."""

from __future__ import annotations

import os
import re
import threading
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import psutil

SHM = Path("/dev/shm")
SHM_PREFIX = f"ckpt-test-{os.getpid()}-"
"""How tests name what they put into /dev/shm, so that another run on the same machine is not blamed for it."""

SECONDS = 5.0
"""How long what is ending already may take."""


def _kept_by_multiprocessing() -> set[Any]:
    return {
        getattr(forkserver._forkserver, "_forkserver_pid", None),  # type: ignore[attr-defined]
        getattr(resource_tracker._resource_tracker, "_pid", None),  # type: ignore[attr-defined]
    }


def children() -> list[psutil.Process]:
    """All processes below this one that still run, but for multiprocessing's own helpers."""
    kept = _kept_by_multiprocessing()
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.pid not in kept and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def shm_files() -> set[str]:
    names = {entry.name for entry in os.scandir(SHM)} if SHM.is_dir() else set()
    others = rf"ckpt-test-(?!{os.getpid()}-)|sem\.|psm_|vllm|cuda\.shm\."  # other runs; engines; the driver
    return {name for name in names if not re.match(others, name) and _ours(name)}


def _ours(name: str) -> bool:
    """torch names its files torch_PID_...: those of a process that is no child of this one are not ours."""
    if (found := re.match(r"torch_(\d+)_", name)) is None:
        return True
    pid = int(found[1])
    return not psutil.pid_exists(pid) or pid in {os.getpid(), *(p.pid for p in children())}


def threads() -> set[threading.Thread]:
    """Threads that would keep this process from ending."""
    return {t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()}


class Watch:
    """What was there before a test; `leaks` says what is there since, after ending it."""

    def __init__(self, socket_dir: Path) -> None:
        self._socket_dir = socket_dir
        self._children = {p.pid for p in children()}
        self._shm, self._threads = shm_files(), threads()

    def leaks(self) -> list[str]:
        found = []
        left = [p for p in children() if p.pid not in self._children]
        _, alive = psutil.wait_procs(left, timeout=SECONDS) if left else ([], [])
        for process in alive:
            found.append(f"process {process.pid}: {' '.join(_command(process))}")
            process.kill()
        for thread in threads() - self._threads:
            thread.join(SECONDS)
            if thread.is_alive():
                found.append(f"thread {thread.name}")
        for name in shm_files() - self._shm:
            found.append(f"/dev/shm/{name}")
        if self._socket_dir.is_dir():
            found.extend(f"socket directory: {path.name}" for path in self._socket_dir.iterdir())
        return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return ["(ended since)"]
