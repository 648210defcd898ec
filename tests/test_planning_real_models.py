"""Plans for the shapes of real checkpoints: how full buckets are, how many modules of the engine are open at a time."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest

from checkpoint_engine.manifest import ITEMSIZE, Manifest, RankManifest, RegionMeta, TensorMeta
from checkpoint_engine.planning import H200, Plan, default_sizes, plan_broadcast, predict, stripe
from checkpoint_engine.settings import MIB

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def minilm() -> Shapes:
    """all-MiniLM-L6-v2: 6 layers of 384, float32; 103 tensors, 91 MB."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.LayerNorm.bias": (384,),
        "embeddings.LayerNorm.weight": (384,),
        "embeddings.position_embeddings.weight": (512, 384),
        "embeddings.token_type_embeddings.weight": (2, 384),
        "embeddings.word_embeddings.weight": (30522, 384),
        "pooler.dense.bias": (384,),
        "pooler.dense.weight": (384, 384),
    }
    for i in range(6):
        for name, (rows, columns) in {
            "attention.output.dense": (384, 384),
            "attention.self.key": (384, 384),
            "attention.self.query": (384, 384),
            "attention.self.value": (384, 384),
            "intermediate.dense": (1536, 384),
            "output.dense": (384, 1536),
        }.items():
            shapes |= {f"encoder.layer.{i}.{name}.weight": (rows, columns), f"encoder.layer.{i}.{name}.bias": (rows,)}
        for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"encoder.layer.{i}.{norm}.weight": (384,), f"encoder.layer.{i}.{norm}.bias": (384,)}
    return {name: ("float32", shape) for name, shape in shapes.items()}


def qwen3(hidden: int, layers: int, heads: int, kv: int, wide: int, experts: int) -> Shapes:
    """Qwen3 in bfloat16, dense (experts 0) or a mixture of experts; `wide`: of one MLP."""
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (151936, hidden), "model.embed_tokens.weight": (151936, hidden), "model.norm.weight": (hidden,)
    }  # fmt: skip
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm.weight": (hidden,), at + "post_attention_layernorm.weight": (hidden,)}
        for name, rows in {"q": heads * 128, "k": kv * 128, "v": kv * 128}.items():
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes |= {at + "self_attn.q_norm.weight": (128,), at + "self_attn.k_norm.weight": (128,)}
        shapes[at + "self_attn.o_proj.weight"] = (hidden, heads * 128)
        if experts:
            shapes[at + "mlp.gate.weight"] = (experts, hidden)
        for mlp in [f"mlp.experts.{e}" for e in range(experts)] or ["mlp"]:
            shapes |= {f"{at}{mlp}.gate_proj.weight": (wide, hidden), f"{at}{mlp}.up_proj.weight": (wide, hidden)}
            shapes[f"{at}{mlp}.down_proj.weight"] = (hidden, wide)
    return {name: ("bfloat16", shape) for name, shape in shapes.items()}


MODELS = {
    "MiniLM": minilm(),
    "Qwen3-8B": qwen3(4096, 36, 32, 8, 12288, 0),
    "Qwen3-30B-A3B": qwen3(2048, 48, 32, 4, 768, 128),
}
COUNTS = {"MiniLM": (103, 90.9e6), "Qwen3-8B": (399, 16.38e9), "Qwen3-30B-A3B": (18867, 61.06e9)}


def nbytes(tensor: tuple[str, tuple[int, ...]]) -> int:
    return ITEMSIZE[tensor[0]] * math.prod(tensor[1])


def striped(shapes: Shapes, world: int) -> Manifest:
    """Over all ranks, the tensors of each without gaps in file order (by name, as files have it)."""
    names = sorted(shapes)
    ranks = []
    for rank, mine in enumerate(stripe([(name, nbytes(shapes[name])) for name in names], world)):
        tensors, end = [], 0
        for name in mine:
            tensors.append(TensorMeta(name, *shapes[name], end))
            end += nbytes(shapes[name])
        ranks.append(RankManifest(rank, "h", "gpu", (RegionMeta(end, tuple(tensors)),)))
    return Manifest("m", tuple(ranks))


def planned(model: str, world: int) -> Plan:
    manifest = striped(MODELS[model], world)
    sizes = default_sizes("cpu" if model == "MiniLM" else "cuda", world, 1 << 40, 1.0)
    return plan_broadcast(manifest, bucket_bytes=sizes.bucket_bytes, ring_bytes=sizes.ring_bytes, piece_bytes=sizes.piece_bytes)


def module(name: str) -> str:
    """The engine's module that a tensor ends in, as vLLM fuses them."""
    name = re.sub(r"\.experts\.\d.*", ".experts.w", name)
    name = re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", name)
    name = re.sub(r"\.(query|key|value)\.", ".qkv.", name)
    return re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", name).rpartition(".")[0]


def most_open(plan: Plan) -> int:
    """The largest number of modules that are half loaded at one time, seen after every tensor."""
    names = [item.name for bucket in plan.buckets for item in bucket.items]
    missing = Counter(map(module, names))
    started: set[str] = set()
    most = 0
    for name in names:
        at = module(name)
        missing[at] -= 1
        started.add(at)
        if not missing[at]:
            started.discard(at)
        most = max(most, len(started))
    return most


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("model", MODELS)
def test_little_space_is_wasted(model: str, world: int) -> None:
    shapes = MODELS[model]
    assert len(shapes) == COUNTS[model][0]
    assert sum(map(nbytes, shapes.values())) == pytest.approx(COUNTS[model][1], rel=0.01)
    plan = planned(model, world)
    used = sum(bucket.nbytes for bucket in plan.buckets)
    gaps = used - plan.nbytes
    slots = sum(max(bucket.nbytes, plan.bucket_bytes) for bucket in plan.buckets)
    print(f"{model} x{world}: {len(plan.buckets)} buckets, gaps {gaps / used:.4%}, {used / slots:.1%} full")
    assert gaps < 0.02 * used
    assert plan.nbytes == sum(map(nbytes, shapes.values()))


@pytest.mark.parametrize(("model", "world", "most"), [
    ("Qwen3-8B", 1, 1), ("Qwen3-8B", 2, 6), ("Qwen3-30B-A3B", 1, 1), ("Qwen3-30B-A3B", 2, 3), ("Qwen3-30B-A3B", 8, 6),
])  # fmt: skip
def test_few_modules_are_open_at_a_time(model: str, world: int, most: int) -> None:
    """The embedding's owner holds up what others can bring in beside it: a few modules of four layers, and no more."""
    plan = planned(model, world)
    assert plan.order == "layers"
    assert most_open(plan) <= most


def one_by_one(shapes: Shapes, world: int) -> Manifest:
    """Each tensor, in the model's own order, to the rank with the fewest bytes so far."""
    first, last = "model.embed_tokens.weight", ("model.norm.weight", "lm_head.weight")
    ends, tensors = [0] * world, [list[TensorMeta]() for _ in range(world)]
    for name in [first, *(n for n in shapes if n not in (first, *last)), *last]:
        rank = ends.index(min(ends))
        tensors[rank].append(TensorMeta(name, *shapes[name], ends[rank]))
        ends[rank] += nbytes(shapes[name])
    return Manifest(
        "m", tuple(RankManifest(r, "h", "gpu", (RegionMeta(ends[r], tuple(mine)),)) for r, mine in enumerate(tensors))
    )


@pytest.mark.parametrize("shapes", [MODELS["Qwen3-8B"], qwen3(5120, 64, 64, 8, 25600, 0)], ids=["8B", "32B"])
def test_both_ranks_lift_all_the_time(shapes: Shapes) -> None:
    """Embedding and head of 1.2 GB and more, and (32B) MLPs larger than a bucket, with which ranks used to take turns."""
    sizes = default_sizes("cuda", 2, 1 << 40, 1.0)
    plan = plan_broadcast(
        one_by_one(shapes, 2), bucket_bytes=sizes.bucket_bytes, ring_bytes=sizes.ring_bytes, piece_bytes=sizes.piece_bytes
    )
    expected = predict(plan, H200, 2)
    assert plan.order == "layers"
    assert expected.seconds < 1.06 * expected.lift


@pytest.mark.parametrize("world", [2, 8, 128])
def test_device_memory(world: int) -> None:
    for model in ("Qwen3-8B", "Qwen3-30B-A3B"):
        plan = planned(model, world)
        largest = max(map(nbytes, MODELS[model].values()))
        assert plan.ring_bytes + 2 * plan.piece_bytes <= 768 * MIB + 2 * largest


@pytest.mark.parametrize("world", [2, 8])
def test_stripes_are_even(world: int) -> None:
    manifest = striped(MODELS["Qwen3-30B-A3B"], world)
    totals = [rank.nbytes for rank in manifest.ranks]
    assert max(totals) - min(totals) < 0.01 * min(totals)
