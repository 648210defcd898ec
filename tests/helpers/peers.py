"""Sources for peer-to-peer reads: processes of their own that serve regions of known bytes, and do as they are told.

Run as a script it is such a process: `python peers.py ADDRESS TRANSPORTS SIZE...` (transports separated by commas). It prints
its offer, then answers each line of its standard input with one line.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.transport.peer.base import PeerOffer, open_transport
from checkpoint_engine.transport.peer.server import PeerServer

if TYPE_CHECKING:
    from helpers.netns import Host

LINE_SECONDS = 40


@functools.cache
def content(region: int, nbytes: int) -> bytes:
    """The bytes of a source's region number `region`; none of them is 0."""
    return random.Random(region).randbytes(nbytes).translate(bytes([0xA5, *range(1, 256)]))


class Source(Closing):
    """A source process named "source PID" that serves regions of these sizes."""

    def __init__(self, sizes: Sequence[int], transports: Sequence[str] = ("shm",), host: Host | None = None) -> None:
        """host: where it runs, and listens; this one if None."""
        self.sizes = tuple(sizes)
        address = "127.0.0.1" if host is None else host.address
        argv = [sys.executable, __file__, address, ",".join(transports), *map(str, sizes)]
        argv = argv if host is None else host.command(argv)
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.offer = PeerOffer.from_json(self._line().encode())

    def tell(self, command: str) -> str:
        """Commands: offer; remove NUMBER SECONDS; add SIZE (a new region, of the next number's bytes). Renews `offer`."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        answer = self._line()
        if answer.startswith("{"):
            self.offer = PeerOffer.from_json(answer.encode())
        return answer

    def _line(self) -> str:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("> "):  # engines print to standard output as well
                return line[2:].strip()
        raise AssertionError(f"the source ended with {self._process.wait(5)}")

    @property
    def name(self) -> str:
        return f"source {self._process.pid}"

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def close(self) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _say(line: str) -> None:
    print(f"> {line}", flush=True)


def _main(address: str, transports: str, *sizes: str) -> None:
    opened = [open_transport(kind) for kind in transports.split(",") if kind not in ("", "tcp")]
    regions: list[HostRegion] = []

    def add(server: PeerServer, nbytes: int) -> None:
        region = HostRegion(nbytes)
        region.view(0, nbytes)[:] = content(len(regions), nbytes)
        regions.append(region)
        server.add(region)

    with PeerServer(f"source {os.getpid()}", [address], opened) as server:
        for size in sizes:
            add(server, int(size))
        _say(server.offer().to_json().decode())
        for line in sys.stdin:
            _obey(server, line.split(), add)


def _obey(server: PeerServer, words: list[str], add: Any) -> None:
    try:
        if words[0] == "add":
            add(server, int(words[1]))
        elif words[0] == "remove":
            (offer,) = (o for o in server.offer().regions if o.region == int(words[1]))
            server.remove(offer, seconds=float(words[2]))
        _say(server.offer().to_json().decode())
    except CheckpointEngineError as e:
        _say(f"{type(e).__name__}: {e}")


if __name__ == "__main__":
    _main(*sys.argv[1:])
