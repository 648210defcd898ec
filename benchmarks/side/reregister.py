"""How long `register_checkpoint` takes from tensors in memory: the first time, and into a pool that is in use already.

    PYTHONPATH=src torchrun --nproc-per-node 2 benchmarks/side/reregister.py qwen3-30b-a3b

The second time other tensors of the same shapes go into the same pool, as after every step of a trainer; then an update's
gather_metas. One JSON line of rank 0, seconds of the slowest rank.
"""

import argparse
import json
import os
import time

import torch
from side import Meeting, base_bytes, nbytes, source
from zoo import ZOO


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("model", choices=list(ZOO))
    model = ap.parse_args().model
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    spec, base = ZOO[model](), base_bytes()
    load, numbers = [0] * world, []
    for i, t in enumerate(spec):
        owner = load.index(min(load))
        load[owner] += nbytes(t)
        if owner == rank:
            numbers.append(i)
    from checkpoint_engine.ps import ParameterServer

    ps = ParameterServer(auto_pg=True)
    meet, seconds = Meeting(rank, world), []
    for step in range(3):
        tensors = {spec[i][0]: source(base, i + step, spec[i]) for i in numbers}
        meet()
        t0 = time.perf_counter()
        ps.register_checkpoint(f"step{step}", named_tensors=tensors, use_shared_memory_pool=True)
        t1 = time.perf_counter()
        ps.gather_metas(f"step{step}")
        seconds.append((max(meet(t1 - t0)), max(meet(time.perf_counter() - t1))))
        ps.unregister_checkpoint(f"step{step}")
    if rank == 0:
        first, *again = seconds
        record = {"model": model, "gb": round(sum(load) / 1e9, 2), "first_s": round(first[0], 2)}
        print(json.dumps(record | {"again_s": [round(s, 2) for s, _ in again], "gather_s": [round(s, 3) for _, s in seconds]}))
    ps.close()


main()
