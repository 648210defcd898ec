"""Ports that are free now and that no outgoing connection will take meanwhile."""

from __future__ import annotations

import os
import random
import socket
from contextlib import ExitStack
from pathlib import Path

_given: set[int] = set()
_random = random.Random(os.urandom(8))


def free_ports(count: int = 2) -> int:
    """The first of `count` neighbouring TCP ports that are all free (the store listens on MASTER_PORT + 1).

    They lie below the range that the kernel gives to outgoing connections, and none is given twice.
    """
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(1000):
        first = _random.randrange(max(1024, ephemeral // 2), ephemeral - count)
        ports = range(first, first + count)
        if _given.isdisjoint(ports) and all_free(ports):
            _given.update(ports)
            return first
    raise RuntimeError(f"no {count} neighbouring ports are free")


def all_free(ports: range) -> bool:
    with ExitStack() as stack:
        for port in ports:
            listener = stack.enter_context(socket.socket())
            try:
                listener.bind(("", port))
            except OSError:
                return False
    return True
