"""Reads from another process of this host, by each peer transport, against a raw socket copy of the same bytes, in turn.

    python benchmarks/peer.py [--gib 1] [--rounds 7] [--transports tcp,shm] [--connections 1,2,4] [--json]

raw, send      the source calls sendall on its memory, the reader recv_into on its own, over one loopback connection
raw, sendfile  likewise, but the source sends straight from its memfd
tcp, N         ours over N connections: requests, confirmations and leases included; connected before the clock starts
shm            ours through shared memory: no network is involved, so its rate is no network's

Both sides run in two processes and write into memory that is there already. A ratio is the median of the rounds' ratios to
the better raw copy of the same round. CPU is the source's, seconds per GB: what a read takes from a host that serves.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import torch

from checkpoint_engine.errors import SettingsError
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.transport.peer.base import PeerOffer, PeerOptions, ReadOp, open_transport
from checkpoint_engine.transport.peer.server import PeerServer

GOAL = 0.8
RAW = ("raw, send", "raw, sendfile")


def serve(nbytes: int, kinds: list[str]) -> None:
    """The source's process: raw copies on request (one byte asks for one), and reads."""
    region = HostRegion(nbytes)
    region.tensor.random_(1, 256)
    memory = region.view(0, nbytes)
    transports = [open_transport(kind) for kind in kinds if kind != "tcp"]
    with socket.create_server(("127.0.0.1", 0)) as door, PeerServer("source", ["127.0.0.1"], transports) as server:
        server.add(region)
        print("> " + json.dumps([server.offer().to_json().decode(), door.getsockname()[1]]), flush=True)
        with door.accept()[0] as sock:
            while order := sock.recv(1):
                if order == b"s":
                    sock.sendall(memory)
                else:
                    sent = 0
                    while sent < nbytes:
                        sent += os.sendfile(sock.fileno(), region.fd, sent, nbytes - sent)


def raw_copy(sock: socket.socket, order: bytes, view: memoryview) -> None:
    sock.sendall(order)
    done = 0
    while done < len(view):
        done += sock.recv_into(view[done:])


def variants(
    offer: PeerOffer, sock: socket.socket, memory: torch.Tensor, kinds: list[str], connections: list[int]
) -> dict[str, Callable[[], object]]:
    view = memoryview(memory.numpy())
    made: dict[str, Callable[[], object]] = {
        RAW[0]: lambda: raw_copy(sock, b"s", view),
        RAW[1]: lambda: raw_copy(sock, b"f", view),
    }
    for kind in kinds:
        for count in connections:
            try:
                transport = open_transport(kind, PeerOptions(connections=count))
            except SettingsError as e:
                print(f"{kind} is left out: {e}", file=sys.stderr)
                break
            peer = transport.connect(offer, seconds=30)
            destination = transport.register(memory)
            ops = [ReadOp(offer.regions[0].region, 0, memory.nbytes, 0)]
            made[f"{kind}, {count}"] = lambda p=peer, d=destination, o=ops: p.submit_read(d, o, seconds=120).wait()  # type: ignore[misc]
            if kind == "mooncake":  # takes one registration of the same memory only
                break
    return made


def measure(nbytes: int, rounds: int, kinds: list[str], connections: list[int]) -> dict[str, dict[str, float]]:
    argv = [sys.executable, __file__, "--serve", str(nbytes), "--transports", ",".join(kinds)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None:
                raise RuntimeError("no pipe")
            line = next(line for line in process.stdout if line.startswith("> "))
            offered, port = json.loads(line[2:])
            source = psutil.Process(process.pid)
            memory = torch.zeros(nbytes, dtype=torch.uint8)
            seconds: dict[str, list[float]] = {}
            cpu: dict[str, list[float]] = {}
            with socket.create_connection(("127.0.0.1", port)) as sock:
                runs = variants(PeerOffer.from_json(offered), sock, memory, kinds, connections)
                for number in range(rounds + 1):
                    for name, run in runs.items():
                        before, start = sum(source.cpu_times()[:2]), time.perf_counter()
                        run()
                        if number:  # the first one warms up
                            seconds.setdefault(name, []).append(time.perf_counter() - start)
                            cpu.setdefault(name, []).append(sum(source.cpu_times()[:2]) - before)
        finally:
            process.kill()
    best = [min(pair) for pair in zip(*(seconds[name] for name in RAW), strict=True)]
    return {
        name: {
            "median_gb_s": nbytes / statistics.median(times) / 1e9,
            "median_ratio": statistics.median(b / t for b, t in zip(best, times, strict=True)),
            "source_cpu_s_per_gb": statistics.median(cpu[name]) / nbytes * 1e9,
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--transports", default="tcp,shm")
    parser.add_argument("--connections", default="1,2,4")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    kinds = options.transports.split(",")
    if options.serve:
        serve(options.serve, kinds)
        return
    rows = measure(int(options.gib * (1 << 30)), options.rounds, kinds, [int(n) for n in options.connections.split(",")])
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{'':16}{'GB/s':>8}{'against raw':>13}{'source CPU s/GB':>17}")
    for name, row in rows.items():
        print(f"{name:16}{row['median_gb_s']:8.2f}{row['median_ratio']:12.2f}x{row['source_cpu_s_per_gb']:17.3f}")
    if ours := [row["median_ratio"] for name, row in rows.items() if name.startswith("tcp")]:
        print(f"tcp at its best / raw socket copy: {max(ours):.2f}x, goal >= {GOAL}: {'met' if max(ours) >= GOAL else 'MISSED'}")


if __name__ == "__main__":
    main()
