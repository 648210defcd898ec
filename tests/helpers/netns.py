"""Two hosts in one machine: network namespaces joined by a veth pair, each with a host name that resolves to its address.

Run as a script it starts a command inside one of them: `python netns.py NAMESPACE NAME ADDRESS HOSTS_FILE COMMAND...`.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x20000, 0x4000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
INTERFACE = "veth0"
_numbers = itertools.count()


class Unavailable(Exception):
    """Why there can be no network namespaces here."""


@dataclass(frozen=True)
class Host:
    """One of the two. Nothing but the other one can be reached from it: there is no default route."""

    namespace: str
    name: str
    address: str
    hosts_file: str

    @property
    def environment(self) -> dict[str, str]:
        """For libraries that cannot find the interface by themselves."""
        return {"GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE}

    def enter(self) -> None:
        """Move the calling process, which must not have started a thread, to this host; there is no way back."""
        with open(f"/run/netns/{self.namespace}") as namespace:
            _call("setns", namespace.fileno(), CLONE_NEWNET)
        _call("unshare", CLONE_NEWUTS | CLONE_NEWNS)
        socket.sethostname(self.name)
        _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        _call("mount", self.hosts_file.encode(), b"/etc/hosts", None, MS_BIND, None)

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv` for subprocess.Popen, to run on this host."""
        return [sys.executable, "-S", __file__, self.namespace, self.name, self.address, self.hosts_file, *argv]

    def run(self, argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end; its output is captured as text. Raises CalledProcessError unless it exits 0."""
        options = {"timeout": 50, "check": True, "capture_output": True, "text": True, **options}
        return subprocess.run(self.command(argv), **options)


class TwoHosts:
    """Makes two hosts with addresses 10.77.0.1 and 10.77.0.2; a context manager, which removes them. `hosts` are the two.

    Raises Unavailable with the reason when namespaces cannot be made.
    """

    def __init__(self) -> None:
        if shutil.which("ip") is None:
            raise Unavailable("no `ip` command (package iproute2)")
        number = f"{os.getpid()}-{next(_numbers)}"
        self._directory = tempfile.mkdtemp(prefix="ce-netns-")
        names, addresses = ("host-a", "host-b"), ("10.77.0.1", "10.77.0.2")
        hosts_file = Path(self._directory) / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for address, name in zip(addresses, names, strict=True))]
        hosts_file.write_text("\n".join(lines) + "\n")
        self.hosts = tuple(
            Host(f"ce-{number}-{name}", name, address, str(hosts_file)) for name, address in zip(names, addresses, strict=True)
        )
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        a, b = self.hosts
        for host in self.hosts:
            _ip("netns", "add", host.namespace)
        _ip("-n", a.namespace, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", b.namespace)
        for host in self.hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", host.namespace, "link", "set", INTERFACE, "up")
        try:
            a.run(["true"])
        except subprocess.CalledProcessError as e:
            raise Unavailable(f"a namespace cannot be entered: {e.stderr.strip().splitlines()[-1]}") from None

    def close(self) -> None:
        for host in self.hosts:
            if Path(f"/run/netns/{host.namespace}").exists():
                _ip("netns", "delete", host.namespace)
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _ip(*argv: str) -> None:
    done = subprocess.run(["ip", *argv], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise Unavailable(f"`ip {' '.join(argv)}`: {done.stderr.strip()}")


def _call(name: str, *args: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args):
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


if __name__ == "__main__":
    Host(*sys.argv[1:5]).enter()
    os.execvp(sys.argv[5], sys.argv[5:])
