"""Rates of digests: ours against xxh3 and numpy on one core and on all, and on a GPU by the kernel and by torch's operations.

    python -m benchmarks.digests [--mib 64] [--rounds 7] [--threads N] [--device cpu|cuda] [--json]

The GPU's figures in one line:    python -m benchmarks.digests --device cuda --mib 1024

CPU: bytes in 1 MiB blocks, as registering makes digests. "cached" goes over one block again and again: the rate when the bytes
were brought by the same core a moment ago. "memory" goes over all of them. numpy is the plain sum of 64-bit words with
weights, which misses pairs of flipped highest bits (memory.checksum); xxh3 cannot be made on a GPU at a useful rate.

GPU: buckets of 64 MiB, each of one tensor, of 16 and of 4096; the kernel's share of what an update of 107 GB/s takes is printed,
for the goal is 5 % of it. Times by events, medians of the rounds; the first launch, which compiles, is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import xxhash

from checkpoint_engine.devices.digests import Layout, Run, Verifier, has_kernel
from checkpoint_engine.memory.checksum import digest, partial_sum
from checkpoint_engine.planning.digests import pack

BLOCK, MIB, BUCKET = 1 << 20, 1 << 20, 64 << 20
UPDATE = 107e9
"""Bytes a second of an update of one H200 (its design's figure): digests may take 5 % of that time."""


def on_cpu(mib: int, rounds: int, threads: int) -> dict[str, float]:
    data = torch.randint(0, 256, (mib * MIB,), dtype=torch.uint8)
    blocks = list(data.split(BLOCK))  # type: ignore[no-untyped-call]
    weights = np.arange(BLOCK // 8, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "ours": lambda block: int(partial_sum(block)),
        "numpy": lambda block: np.dot(block.numpy().view(np.uint64), weights),
        "xxh3": lambda block: xxhash.xxh3_64_intdigest(block.numpy().data),
    }
    found = {}
    with ThreadPoolExecutor(threads) as pool:
        for name, way in ways.items():
            runs: dict[str, Callable[[], object]] = {
                f"{name}, cached, 1 thread": lambda way=way: [way(blocks[0]) for _ in blocks],  # type: ignore[misc]
                f"{name}, memory, 1 thread": lambda way=way: [way(block) for block in blocks],  # type: ignore[misc]
                f"{name}, memory, {threads} threads": lambda way=way: list(pool.map(way, blocks)),  # type: ignore[misc]
            }
            for what, run in runs.items():
                run()
                found[what] = len(data) / 1e9 / statistics.median(timed(run) for _ in range(rounds))
    small = [data[i * 512 : i * 512 + 512] for i in range(2000)]
    seconds = statistics.median(timed(lambda: [digest(tensor) for tensor in small]) for _ in range(rounds))
    return found | {"ours, microseconds for a tensor of 512 bytes": seconds / len(small) * 1e6}


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def on_gpu(mib: int, rounds: int) -> dict[str, float]:
    memory = torch.randint(0, 256, (mib * MIB,), dtype=torch.uint8, device="cuda")
    found = {}
    for kernel in [True, False] if has_kernel() else [False]:
        name = "kernel" if kernel else "torch"
        for tensors in (1, 16, 4096) if kernel else (1, 16):
            size = BUCKET // tensors
            buckets = [range(start, start + BUCKET, size) for start in range(0, len(memory) - BUCKET + 1, BUCKET)]
            layout = Layout([[Run(0, offset, size) for offset in bucket] for bucket in buckets])
            verifier = Verifier(layout, pack([0] * len(layout.runs)), [memory], kernel=kernel)
            first = gpu_seconds(verifier, 1)
            seconds = statistics.median(gpu_seconds(verifier, len(buckets)) for _ in range(rounds))
            nbytes = len(buckets) * BUCKET
            found[f"{name}, {tensors} tensors a bucket, GB/s"] = nbytes / seconds / 1e9
            found[f"{name}, {tensors} tensors a bucket, % of an update at 107 GB/s"] = 100 * seconds / (nbytes / UPDATE)
            if tensors == 1:
                found[f"{name}, first launch, s"] = first
    return found


def gpu_seconds(verifier: Verifier, buckets: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()  # type: ignore[no-untyped-call]
    for bucket in range(buckets):
        verifier.check(bucket)
    end.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3  # type: ignore[no-untyped-call]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gpu = options.device == "cuda"
    found = on_gpu(max(64, options.mib), options.rounds) if gpu else on_cpu(options.mib, options.rounds, options.threads)
    if options.json:
        print(json.dumps(found))
        return 0
    width = max(map(len, found))
    for what, value in found.items():
        print(f"{what:<{width}}  {value:10.2f}")
    if not gpu:
        print("GB/s where nothing else is said")
    return 0


if __name__ == "__main__":
    sys.exit(main())
