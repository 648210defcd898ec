"""The two hosts that other tests stand on are two hosts."""

from __future__ import annotations

import socket
import sys

from helpers.netns import TwoHosts
from helpers.ranks import run_ranks


def meet(rank: int, world_size: int) -> tuple[str, str, str]:
    """All ranks meet at a TCP store on the first host; each returns its host name, its address, and its neighbour's name."""
    import os
    from datetime import timedelta

    import torch.distributed as dist

    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, rank == 0, timedelta(seconds=30))
    name = socket.gethostname()
    store.set(f"host-{rank}", name)
    neighbour = store.get(f"host-{(rank + 1) % world_size}").decode()
    store.set(f"done-{rank}", "")
    store.wait([f"done-{other}" for other in range(world_size)])
    store.add("left", 1)
    while rank == 0 and store.add("left", 0) < world_size:  # the store lives in rank 0
        continue
    return name, socket.gethostbyname(name), neighbour


def test_ranks_of_two_hosts_meet(netns: TwoHosts) -> None:
    a, b = ("host-a", "10.77.0.1"), ("host-b", "10.77.0.2")
    assert run_ranks(meet, 4, hosts=netns.hosts) == [(*a, "host-a"), (*a, "host-b"), (*b, "host-b"), (*b, "host-a")]


def test_nothing_else_can_be_reached(netns: TwoHosts) -> None:
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
    done = netns.hosts[1].run([sys.executable, "-c", code], check=False)
    assert done.returncode == 1
    assert "Network is unreachable" in done.stderr


def test_a_command_runs_there(netns: TwoHosts) -> None:
    code = "import socket; print(socket.gethostname(), socket.gethostbyname('host-b'))"
    assert netns.hosts[0].run([sys.executable, "-c", code]).stdout.split() == ["host-a", "10.77.0.2"]
