"""The demo's child processes: started in sessions of their own, gone when the demo is, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from checkpoint_engine.errors import DeadlineError, PeerLostError

_END_SECONDS = 5.0


class Child:
    """`python -m ARGUMENTS`, whose lines on stdout are read with a deadline and whose stderr goes to `log`.

    In a session of its own: Ctrl-C reaches the demo only, which then ends it. It also ends when its stdin is closed.
    """

    def __init__(self, name: str, arguments: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.name, self._log = name, log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **env},
                start_new_session=True, text=True,
            )  # fmt: skip
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self, stdout: IO[str]) -> None:
        for line in stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def send(self, command: dict[str, Any]) -> None:
        """One line of JSON to its stdin. Raises PeerLostError when it has ended."""
        stdin = self._process.stdin
        try:
            if stdin is None:
                raise BrokenPipeError
            stdin.write(json.dumps(command) + "\n")
            stdin.flush()
        except OSError:
            raise self._lost() from None

    def line(self, seconds: float, what: str) -> str:
        """Its next line. Raises DeadlineError, or PeerLostError with the end of its log when it has ended."""
        try:
            line = self._lines.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            raise DeadlineError(f"{self.name} {what}", seconds) from None
        if line is None:
            raise self._lost()
        return line

    def _lost(self) -> PeerLostError:
        try:
            code: object = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            code = "unknown"
        log = self._log.read_text(errors="replace").strip()[-2000:]
        return PeerLostError(self.name, f"exit code {code}; its last words: {log or 'none'}")

    def ask_to_end(self) -> None:
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):  # what was still to be written has no reader
                self._process.stdin.close()

    def end(self, deadline: float, seconds: float) -> None:
        """Wait for it until `deadline` (time.monotonic()), then terminate it, wait `seconds`, then kill it."""
        for stop in (None, self._process.terminate, self._process.kill):
            if stop is not None:
                stop()
                deadline = time.monotonic() + seconds
            try:
                self._process.wait(max(0.0, deadline - time.monotonic()))
                break
            except subprocess.TimeoutExpired:
                continue
        self._reader.join(_END_SECONDS)
        if self._process.stdout is not None:
            self._process.stdout.close()


class Fleet:
    """The children. Leaving the `with` block ends them all: asked first, terminated after `end_seconds`, killed after as many."""

    def __init__(self, directory: Path, end_seconds: float = _END_SECONDS) -> None:
        self._directory, self._end_seconds = directory, end_seconds
        self._children: list[Child] = []

    def start(self, name: str, *arguments: str) -> Child:
        env = {"CHECKPOINT_ENGINE_SOCKET_DIR": str(self._directory / "sockets")}
        child = Child(name, arguments, env, self._directory / f"{name.replace(' ', '-')}.log")
        self._children.append(child)
        return child

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for child in self._children:
            child.ask_to_end()
        deadline = time.monotonic() + (self._end_seconds if error is None else min(0.5, self._end_seconds))
        for child in self._children:
            child.end(deadline, self._end_seconds)


def free_port_pair() -> int:
    """A port p such that p and p + 1 were free just now: a parameter server uses both."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
    raise DeadlineError("two free ports in a row", 0.0)
