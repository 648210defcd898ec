"""What this rank's workers serve, as far as its own updates tell: what a failed update can go back to, and who was restarted."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import NamedTuple

from checkpoint_engine.manifest import Manifest
from checkpoint_engine.transport.messages import Hello


class Commit(NamedTuple):
    """A checkpoint that all ranks of an update have committed, as it was gathered."""

    manifest: Manifest
    version: str


class Served:
    """last: None before the first update that succeeded; also what a caller says that the engines serve."""

    def __init__(self) -> None:
        self.last: Commit | None = None
        self._workers: dict[int, str] = {}  # pid -> version that it committed in the last update
        self._now: dict[int, str] = {}  # the same, in the update that runs

    def notice(self, hello: Hello) -> str | None:
        """What there is to say of a worker that came: that it is another process, or serves something else, than the one that
        committed here last. None: nothing."""
        pid, serves = hello.pid, "no version" if hello.version is None else repr(hello.version)
        before = self._now.get(pid) or self._workers.get(pid)
        host = socket.gethostname()
        if before is not None:
            if before == hello.version:
                return None
            why = "it was started anew, or somebody else updated it"
            return f"the worker on {host} (pid {pid}) serves {serves} and not {before!r}, which it committed here: {why}"
        if not self._workers or self._now or hello.version in self._workers.values():
            return None
        gone = ", ".join(f"pid {pid}, which served {version!r}" for pid, version in self._workers.items())
        return f"the worker on {host} was started anew: pid {pid} serves {serves}, in place of {gone}"

    def acknowledged(self, pid: int, version: str) -> None:
        """A worker has committed."""
        self._now[pid] = version

    @contextlib.contextmanager
    def updating(self, commit: Commit) -> Iterator[None]:
        """While an update runs, which ends with `commit` unless it raises; even then some workers may have committed."""
        try:
            yield
            self.last, self._workers = commit, {}
        finally:
            self._workers.update(self._now)
            self._now = {}
