"""Registering cached safetensors files, against mmap and a 32-thread copy, in turn, in one run.

    python benchmarks/registering.py [--gib 1] [--files 2] [--tensor-mib 16] [--rounds 5] [--threads N] [--dir DIR] [--json]

First touch costs many times the copy, so like is compared with like:

fresh  into memory that nobody has touched. Ours are memfd pages, which other processes can map; a kernel takes twice as
       long to make them as private ones. So the mmap side is run into a memfd and into private memory (torch.empty), too.
again  into memory that is there already.

Giving memory back is not timed on any side. Ours is timed with and without digests of the tensors. The mmap side opens the
files with safetensors' safe_open, which maps them, and copies each tensor into one destination. Read the ratios; the GB/s
are those of this machine at this moment. CPU is the least that a round took, seconds of all threads per GB: it hardly
depends on what else the machine does, whereas 32 threads take a larger share of a busy machine than a few do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoint_engine.memory.checkpoint import HostCheckpoint, build
from checkpoint_engine.memory.pool import RegionPool
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.memory.safetensors import SafetensorsFile, parse_file
from checkpoint_engine.settings import Settings

MMAP_THREADS = 32


def write_files(folder: Path, gib: float, count: int, tensor_mib: float) -> list[Path]:
    """Files of random bytes, `gib` GiB in all, left in the page cache."""
    per_tensor = int(tensor_mib * (1 << 20)) // 2
    tensors = max(1, round(gib * (1 << 30) / count / per_tensor / 2))
    paths = []
    for i in range(count):
        content = {f"layers.{j}.w": torch.randint(0, 1 << 15, (per_tensor,), dtype=torch.int16) for j in range(tensors)}
        paths.append(folder / f"{i}.safetensors")
        save_file({f"files.{i}.{name}": value.view(torch.bfloat16) for name, value in content.items()}, paths[-1])
        with paths[-1].open("rb") as f:
            os.fsync(f.fileno())
            while f.read(16 << 20):
                pass
    return paths


def mmap_copy(files: list[SafetensorsFile], target: torch.Tensor) -> None:
    """Copy every tensor out of the mapped files into `target`, one after the other, with 32 threads."""
    position = 0
    jobs = []
    for file in files:
        with safe_open(file.path, framework="pt") as opened:
            for tensor in file.tensors:
                source = opened.get_tensor(tensor.name).view(-1).view(torch.uint8)
                jobs.append((target[position : position + tensor.nbytes], source))
                position += tensor.nbytes
    with ThreadPoolExecutor(MMAP_THREADS) as workers:
        for _ in workers.map(lambda job: job[0].copy_(job[1]), jobs):
            pass


def variants(paths: list[Path], threads: int, pool: RegionPool) -> dict[str, Callable[[], object]]:
    """Each returns what must live until the clock has stopped."""
    files = [parse_file(path) for path in paths]
    nbytes = sum(tensor.nbytes for file in files for tensor in file.tensors)
    there = torch.zeros(nbytes, dtype=torch.uint8)

    def mmap_into(target: torch.Tensor) -> torch.Tensor:
        mmap_copy(files, target)
        return target

    def mmap_memfd() -> object:
        region = HostRegion(nbytes, touch=False)
        mmap_copy(files, region.tensor)
        return region

    def ours(digests: bool, reuse: bool) -> object:
        return build("c", files=paths, pool=pool, threads=threads, inplace=False, reuse=reuse, digests=digests)

    return {
        "fresh: mmap, memfd": mmap_memfd,
        "fresh: mmap, private": lambda: mmap_into(torch.empty(nbytes, dtype=torch.uint8)),
        "fresh: ours": lambda: ours(False, False),
        "fresh: ours, digests": lambda: ours(True, False),
        "again: mmap": lambda: mmap_into(there),
        "again: ours": lambda: ours(False, True),
        "again: ours, digests": lambda: ours(True, True),
    }


def measure(paths: list[Path], rounds: int, threads: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and CPU seconds of every round for every variant; one round before them is thrown away."""
    seconds: dict[str, list[tuple[float, float]]] = {}
    with RegionPool(threads=threads) as pool:
        runs = variants(paths, threads, pool)
        for _ in range(rounds + 1):
            for name, run in runs.items():
                started, cpu = time.perf_counter(), time.process_time()
                result = run()
                seconds.setdefault(name, []).append((time.perf_counter() - started, time.process_time() - cpu))
                if isinstance(result, HostCheckpoint):
                    result.close(keep=name.startswith("again"))
                del result
    return {name: values[1:] for name, values in seconds.items()}


def summarise(seconds: dict[str, list[tuple[float, float]]], nbytes: int) -> dict[str, dict[str, float]]:
    """Rates, and ratios against the first variant of the same kind."""
    rows = {}
    first: dict[str, str] = {}
    for name in seconds:
        base = first.setdefault(name.split(":")[0], name)
        (wall, cpu), (base_wall, base_cpu) = (zip(*seconds[n], strict=True) for n in (name, base))
        rows[name] = {
            "best_gb_s": nbytes / min(wall) / 1e9,
            "median_gb_s": nbytes / statistics.median(wall) / 1e9,
            "cpu_s_per_gb": min(cpu) / nbytes * 1e9,
            "best_ratio": min(base_wall) / min(wall),
            "median_ratio": statistics.median(base_wall) / statistics.median(wall),
            "cpu_ratio": min(base_cpu) / min(cpu),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="bytes of all files, GiB")
    parser.add_argument("--files", type=int, default=2)
    parser.add_argument("--tensor-mib", type=float, default=16.0, help="bytes of one tensor, MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=Settings().io_threads, help="of ours")
    parser.add_argument("--dir", default=None, help="where to put the files; not /dev/shm")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        paths = write_files(Path(folder), arguments.gib, arguments.files, arguments.tensor_mib)
        nbytes = sum(path.stat().st_size for path in paths)
        seconds = measure(paths, arguments.rounds, arguments.threads)
    rows = summarise(seconds, nbytes)
    if arguments.json:
        json.dump({"bytes": nbytes, "files": arguments.files, "threads": arguments.threads, "rows": rows}, sys.stdout, indent=2)
        print()
        return
    print(
        f"{nbytes / 1e9:.2f} GB in {arguments.files} cached files, {arguments.rounds} rounds in turn, {arguments.threads} threads"
    )
    print(f"{'':22}{'best':>8}{'median':>8} GB/s {'CPU s/GB':>10}     against mmap: best  median    CPU")
    for name, r in rows.items():
        rates = f"{r['best_gb_s']:8.2f}{r['median_gb_s']:8.2f}{r['cpu_s_per_gb']:16.3f}"
        print(f"{name:22}{rates}{r['best_ratio']:22.2f}x{r['median_ratio']:7.2f}x{r['cpu_ratio']:6.2f}x")


if __name__ == "__main__":
    main()
