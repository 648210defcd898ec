"""What recording costs, and what a replay saves: many small tensors, a loader as vLLM's, one process, CPU time of one thread.

    python -m benchmarks.recorded_loads [--layers 48] [--experts 128]

The tensors have a Qwen3 MoE's names and are small (1 KiB), so that the figures tell of their number, not of their bytes.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoint_engine.loads.model import Model
from checkpoint_engine.loads.moves import Source
from checkpoint_engine.loads.plan import checkpoint_fingerprint
from checkpoint_engine.loads.recorder import Recorder
from checkpoint_engine.loads.replay import Replayer

HIDDEN, WIDTH, BUCKETS = 32, 16, 20


def specification(layers: int, experts: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (512, HIDDEN))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", 64), ("k", 16), ("v", 16)):
            shapes.append((f"{prefix}self_attn.{name}_proj.weight", (rows, HIDDEN)))
        shapes += [(f"{prefix}self_attn.o_proj.weight", (HIDDEN, 64)), (f"{prefix}input_layernorm.weight", (HIDDEN,))]
        for expert in range(experts):
            for name, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
                shapes.append((f"{prefix}mlp.experts.{expert}.{name}_proj.weight", shape))
    return [(name, shape, torch.bfloat16) for name, shape in (*shapes, ("lm_head.weight", (512, HIDDEN)))]


def bucket_of(part: list[tuple[str, tuple[int, ...], torch.dtype]]) -> tuple[torch.Tensor, list[Source], list[Any]]:
    """Memory with random values, where each tensor lies in it, and the tensors."""
    sources, tensors, end = [], [], 0
    for name, shape, dtype in part:
        sources.append(Source(name, 0, end))
        end += -(-torch.Size(shape).numel() * dtype.itemsize // 256) * 256
    raw = torch.randint(0, 256, (end,), dtype=torch.uint8)
    for (name, shape, dtype), source in zip(part, sources, strict=True):
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        tensors.append((name, raw[source.offset : source.offset + nbytes].view(dtype).view(shape)))
    return raw, sources, tensors


def timed(what: str, work: Callable[[], Any]) -> Any:
    start = time.thread_time()
    result = work()
    print(f"{what:<28}{time.thread_time() - start:9.4f} s")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent / "side"))
    from tpmodel import TPModel  # type: ignore[import-not-found]

    specified = specification(arguments.layers, arguments.experts)
    size = -(-len(specified) // BUCKETS)
    buckets = [bucket_of(specified[start : start + size]) for start in range(0, len(specified), size)]
    model = TPModel(specified, 2, 1, "cpu")
    print(f"{len(specified)} tensors in {len(buckets)} buckets")
    gc.disable()

    def load() -> None:
        for _, _, tensors in buckets:
            model.load_weights(tensors)

    timed("loader, first time", load)
    timed("loader", load)
    recorder = timed("recorder", lambda: Recorder(Model(model.p)))
    timed("loader, recorded", lambda: [recorder.load(model.load_weights, tensors) for _, _, tensors in buckets])
    rows = [[(n, "bfloat16", tuple(t.shape)) for n, t in tensors] for _, _, tensors in buckets]
    plan = timed("plan", lambda: recorder.finish(Model(model.p), checkpoint_fingerprint(rows)))
    replayer = timed("replayer", lambda: Replayer(plan, Model(model.p)))
    prepared = timed("prepare", lambda: [replayer.prepare(sources) for _, sources, _ in buckets])
    for attempt in ("replay, first time", "replay"):
        timed(attempt, lambda: [p.replay([raw]) for p, (raw, _, _) in zip(prepared, buckets, strict=True)])
    print(f"{sum(len(p.moves) for p in prepared)} moves, {plan.nbytes} bytes, {len(plan.loader)} tensors left to the loader")


if __name__ == "__main__":
    main()
