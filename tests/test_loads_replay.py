"""Replaying: moves of a bucket, by plain copies and by the kernel; and plans that have to prove themselves."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import threading
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from checkpoint_engine.devices.cudart import MAX_PITCH
from checkpoint_engine.errors import LoadPlanError
from checkpoint_engine.loads.bulk import BULK_BYTES, ROW_BYTES, in_bulk
from checkpoint_engine.loads.model import Model
from checkpoint_engine.loads.moves import MAX_DIMS, Move, Source, moves
from checkpoint_engine.loads.plan import Copy, LoadersTensor, LoadPlan, PlannedTensor, Storage
from checkpoint_engine.loads.proof import Proof
from checkpoint_engine.loads.replay import Copies, Replayer, make_ready
from helpers.loads import Memory, Run, Weights, record, replay

BF16 = torch.bfloat16
EXPERTS, ROWS, WIDTH = 8, 4, 6


def experts(seed: int) -> Weights:
    """gate, up and down of every expert, as checkpoints have them."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"experts.{e}.{which}" for e in range(EXPERTS) for which in ("gate", "up", "down")]
    shapes = [(WIDTH, 2 * ROWS) if name.endswith("down") else (2 * ROWS, WIDTH) for name in names]
    return [(name, torch.randn(s, generator=generator).to(BF16)) for name, s in zip(names, shapes, strict=True)]


def fused(device: str = "cpu") -> dict[str, torch.Tensor]:
    w13 = torch.zeros(EXPERTS, 2 * ROWS, WIDTH, dtype=BF16, device=device)
    return {"moe.w13": w13, "moe.w2": torch.zeros(EXPERTS, WIDTH, ROWS, dtype=BF16, device=device)}


def second_rank_of_two(tensors: dict[str, torch.Tensor]) -> Run:
    """Loads as vLLM's fused experts do."""

    def run(weights: Weights) -> None:
        for name, w in weights:
            _, expert, which = name.split(".")
            if which == "down":
                tensors["moe.w2"][int(expert)].copy_(w.narrow(1, ROWS, ROWS))
            else:
                half = 0 if which == "gate" else ROWS
                tensors["moe.w13"][int(expert)].narrow(0, half, ROWS).copy_(w.narrow(0, ROWS, ROWS))

    return run


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_experts_of_a_layer_are_three_moves() -> None:
    tensors = fused()
    plan = record(second_rank_of_two(tensors), [experts(1)], tensors)
    memory = Memory(experts(2))
    prepared = Replayer(plan, Model(tensors)).prepare(memory.sources)
    assert len(prepared.moves) == 3 and prepared.rest == []
    assert prepared.nbytes == plan.nbytes == sum(t.nbytes for t in tensors.values())
    prepared.replay([memory.raw])
    fresh = fused()
    second_rank_of_two(fresh)(experts(2))
    assert same(tensors, fresh)


def test_ten_updates_from_changing_memory() -> None:
    tensors, fresh = fused(), fused()
    plan = record(second_rank_of_two(tensors), [experts(1)], tensors)
    prepared = Replayer(plan, Model(tensors)).prepare(Memory(experts(1)).sources)
    for seed in range(10):
        prepared.replay([Memory(experts(seed)).raw])
        second_rank_of_two(fresh)(experts(seed))
        assert same(tensors, fresh)


copies = st.builds(
    lambda source, target, run, sizes: (source, target, run, sizes),
    st.integers(0, 40), st.integers(0, 40), st.sampled_from([1, 2, 3, 4, 8, 16, 48]), st.lists(st.integers(1, 4), max_size=5),
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@example([(0, 0, 48, []), (0, 0, 48, [3, 4, 4, 4, 4])], [0] * 6, 0)  # tensors of more than 64 KiB
@given(st.lists(copies, max_size=6), st.lists(st.integers(0, 3), min_size=6, max_size=6), st.integers(0, 17))
def test_moves_are_the_copies_however_they_are_joined_and_split(
    found: list[tuple[int, int, int, list[int]]], gaps: list[int], shift: int
) -> None:
    plan, sources = laid_out(found, gaps)
    reach = max((s.offset + math.prod(t.shape) for s, t in zip(sources, plan.planned, strict=True)), default=0)
    memory = torch.randint(0, 256, (shift + reach,), dtype=torch.uint8)[shift:]
    expected = torch.zeros(plan.storages[0].nbytes, dtype=torch.uint8)
    for source, tensor in zip(sources, plan.planned, strict=True):
        one_by_one(tensor.copies[0], source.offset, memory, expected)
    for limit in (None, MAX_DIMS, 1):
        result = torch.zeros_like(expected)
        joined = moves(plan, sources, limit)
        assert all(limit is None or len(move.sizes) <= limit for move in joined)
        Copies(joined, [result]).run([memory])
        assert torch.equal(result, expected)


def laid_out(found: list[tuple[int, int, int, list[int]]], gaps: list[int]) -> tuple[LoadPlan, list[Source]]:
    """A plan of one copy for each tensor, whose targets lie behind one another."""
    planned, sources, end = [], [], 0
    for number, (source, target, run, sizes) in enumerate(found):
        strides, step = [], run
        for n in reversed(sizes):
            step += gaps[number]
            strides.insert(0, step)
            step *= n
        there = tuple(s * 2 for s in strides) if number % 2 else tuple(strides)
        copy = Copy(source, 0, end + target, run, tuple(sizes), there, tuple(strides))
        end += target + step
        nbytes = source + run + sum((n - 1) * s for n, s in zip(sizes, there, strict=True))
        planned.append(PlannedTensor(f"t{number}", "uint8", (nbytes,), (copy,)))
        sources.append(Source(f"t{number}", 0, 64 * number))
    plan = LoadPlan("", "", (Storage(end + 64, ("m.w",)),), tuple(planned), ())
    plan.check()
    return plan, sources


def one_by_one(c: Copy, offset: int, memory: torch.Tensor, target: torch.Tensor) -> None:
    import itertools

    for index in itertools.product(*map(range, c.sizes)):
        a = offset + c.source + sum(i * s for i, s in zip(index, c.source_strides, strict=True))
        b = c.target + sum(i * s for i, s in zip(index, c.target_strides, strict=True))
        target[b : b + c.run] = memory[a : a + c.run]


# Plans that must not be used


def plan_of(copy: Copy, nbytes: int = 64, shape: tuple[int, ...] = (8, 8), **more: tuple[LoadersTensor, ...]) -> LoadPlan:
    return LoadPlan("", "", (Storage(nbytes, ("m.w",)),), (PlannedTensor("w", "uint8", shape, (copy,)),), more.get("loader", ()))


@pytest.mark.parametrize(
    "copy",
    [
        Copy(0, 0, 0, 65), Copy(1, 0, 0, 64), Copy(0, 0, 1, 64), Copy(0, 1, 0, 8), Copy(0, -1, 0, 8), Copy(-8, 0, 0, 8),
        Copy(0, 0, -8, 8), Copy(0, 0, 0, 8, (8,), (9,), (8,)), Copy(0, 0, 0, 8, (8,), (8,), (9,)), Copy(0, 0, 0, 0),
        Copy(0, 0, 0, 8, (8,), (8,), ()), Copy(0, 0, 0, 8, (2,), (-8,), (8,)), Copy(0, 0, 0, 8, (0,), (8,), (8,)),
    ],
)  # fmt: skip
def test_a_plan_that_leaves_its_tensors_is_refused(copy: Copy) -> None:
    assert LoadPlan.decode(plan_of(Copy(0, 0, 0, 64)).encode()).nbytes == 64
    with pytest.raises(LoadPlanError, match="'w'"):
        LoadPlan.decode(plan_of(copy).encode())


@pytest.mark.parametrize("data", [b"", b"\x80", b"{}", plan_of(Copy(0, 0, 0, 64)).encode()[:-3]])
def test_what_is_no_plan_is_refused(data: bytes) -> None:
    with pytest.raises(LoadPlanError, match="not a load plan"):
        LoadPlan.decode(data)


def test_a_replay_needs_the_model_and_the_memory_that_it_was_made_for() -> None:
    tensors = fused()
    plan = record(second_rank_of_two(tensors), [experts(1)], tensors)
    with pytest.raises(LoadPlanError, match="not where or what"):
        Replayer(plan, Model(fused()))
    memory = Memory(experts(1))
    prepared = Replayer(plan, Model(tensors)).prepare(memory.sources)
    before = tensors["moe.w2"].clone()
    for wrong in ([], [memory.raw[:1000]]):
        with pytest.raises(LoadPlanError, match="memory 0"):
            prepared.replay(wrong)
    with pytest.raises(LoadPlanError, match="before the start"):
        Replayer(plan, Model(tensors)).prepare([Source("experts.0.down", 0, -256)])
    assert torch.equal(tensors["moe.w2"], before)


def test_a_plan_proves_itself() -> None:
    tensors = fused()
    run = second_rank_of_two(tensors)
    plan = record(run, [experts(1)], tensors)
    loaded = {name: tensor.clone() for name, tensor in tensors.items()}
    proof = Proof(plan, Model(tensors))
    proof.poison()
    for name, tensor in tensors.items():
        assert not (tensor.view(torch.uint8) == loaded[name].view(torch.uint8)).any(), "a byte was left as it was"
    assert proof.differing() == ["moe.w13", "moe.w2"]
    replay(plan, run, [experts(1)], tensors)
    assert proof.differing() == [] and same(tensors, loaded)
    assert proof.summary([]).startswith("proved")


def test_a_plan_that_is_wrong_is_named_and_the_loader_heals_it() -> None:
    tensors = fused()
    run = second_rank_of_two(tensors)
    plan = record(run, [experts(1)], tensors)
    loaded = {name: tensor.clone() for name, tensor in tensors.items()}
    first = plan.planned[2]
    assert first.name == "experts.0.down"
    wrong = PlannedTensor(first.name, first.dtype, first.shape, (Copy(0, *list_of(first.copies[0])[1:]),))
    plan = LoadPlan(plan.model, plan.checkpoint, plan.storages, (*plan.planned[:2], wrong, *plan.planned[3:]), ())
    proof = Proof(plan, Model(tensors))
    proof.poison()
    replay(plan, run, [experts(1)], tensors)
    assert proof.differing() == ["moe.w2"]
    assert "moe.w2" in proof.summary(["moe.w2"])
    run(experts(1))
    assert proof.differing() == [] and same(tensors, loaded)


def list_of(c: Copy) -> tuple[int, int, int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return c.source, c.storage, c.target, c.run, c.sizes, c.source_strides, c.target_strides


def test_a_loader_that_waits_for_a_planned_tensor_does_not_pass_the_proof() -> None:
    """b is cast, a is not; but this loader writes b only once it has seen a. Nothing of that goes through the dispatcher."""
    tensors = {"m.a": torch.zeros(4), "m.b": torch.zeros(4)}

    def run(weights: Weights) -> None:
        given = dict(weights)
        if "a" in given:
            tensors["m.a"].copy_(given["a"])
            tensors["m.b"].copy_(given["b"])

    buckets = [[("a", torch.rand(4)), ("b", torch.rand(4, dtype=torch.float64))]]
    plan = record(run, buckets, tensors)
    assert [t.name for t in plan.planned] == ["a"] and [t.name for t in plan.loader] == ["b"]
    proof = Proof(plan, Model(tensors))
    proof.poison()
    replay(plan, run, buckets, tensors)
    assert proof.differing() == ["m.b"]


def test_a_loader_whose_threads_write_does_not_pass_the_proof() -> None:
    """It writes every parameter twice, once in a thread that the recorder does not see: the later write is not in the plan."""
    tensors = {"m.w": torch.zeros(4, 6)}

    def run(weights: Weights) -> None:
        for _, w in weights:
            tensors["m.w"].copy_(w)
            worker = threading.Thread(target=lambda w=w: tensors["m.w"][2:].copy_(w[:2]))
            worker.start()
            worker.join()

    buckets = [[("w", torch.rand(4, 6))]]
    plan = record(run, buckets, tensors)
    proof = Proof(plan, Model(tensors))
    proof.poison()
    replay(plan, run, buckets, tensors)
    assert proof.differing() == ["m.w"]


# The kernel: on a GPU, and by Triton's interpreter where Triton is installed and told to use it

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def kernel_matches_copies(device: str, shift: int, memory_device: str) -> None:
    from checkpoint_engine.loads.kernel import Gather

    memory = torch.randint(0, 256, (1 << 25,), dtype=torch.uint8)
    there = memory.to(memory_device)
    if device != memory_device:
        there = memory.pin_memory()
    found = [
        Move(0, 0, 0, 16, 4096, (), (), ()),
        Move(0, 512, 0, 8192, 96, (8,), (256,), (96,)),
        Move(0, 100, 0, 9000, 2, (5, 7), (2, 10), (14, 2)),
        Move(0, 3, 0, 9101, 1, (3, 2, 5), (100, 0, 7), (11, 5, 1)),
        Move(0, 20000, 0, 16384, 16384 + 8, (), (), ()),
        Move(0, 4, 0, 40000, 4, (33,), (12,), (4,)),
        Move(0, 1024, 0, 42000, 6, (129, 2), (8, 4096), (12, 6)),
    ]
    if device == "cuda":  # by the copy engine, out of host memory
        found += [
            Move(0, 1 << 20, 0, 1 << 16, LARGE, (), (), ()),
            Move(0, 1 << 20, 0, 5_000_001, 270_001, (2, 16), (100, 500_000), (4_400_000, 270_003)),
            Move(0, 77, 0, 14_000_000, 768, (3, 2048), (1536 * 4096, 1536), (768 * 2049, 768)),
            # Up to the last byte of the memory, when that is shifted by 16.
            Move(0, LAST, 0, 20_000_000, 768, (3, 2048), (1536 * 4096, 1536), (768 * 2048, 768)),
        ]
    results: list[torch.Tensor] = []
    for kind, where, slots in ((Copies, "cpu", False), (Gather, device, False), (Gather, device, True)):
        storage = torch.zeros(1 << 25, dtype=torch.uint8, device=where)
        way = kind(found, {0: storage} if slots else [storage])
        for moved in (shift, 0, shift):
            way.run([(memory if where == "cpu" and kind is Copies else there)[moved:]])
        results.append(storage.cpu())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


LARGE = BULK_BYTES + 5
LAST = (1 << 25) - 16 - (2 * 1536 * 4096 + 2047 * 1536 + 768)
ROW = ROW_BYTES + 1
MANY = BULK_BYTES // ROW_BYTES  # rows that are enough


@pytest.mark.parametrize(
    ("move", "copies"),
    [
        (Move(1, 7, 0, 0, BULK_BYTES - 1, (), (), ()), 0),
        (Move(1, 7, 0, 0, LARGE, (), (), ()), 1),
        (Move(1, 7, 0, 0, LARGE, (4,), (2 * LARGE,), (LARGE,)), 1),
        (Move(1, 7, 0, 0, LARGE, (2, 4), (3, 2 * LARGE), (9 * LARGE, LARGE)), 2),
        (Move(1, 7, 0, 0, LARGE, (4,), (LARGE - 1,), (LARGE,)), 4),  # rows that overlap are none to CUDA
        (Move(1, 7, 0, 0, LARGE, (2,), (1 << 31,), (LARGE,)), 2),
        (Move(1, 7, 0, 0, LARGE, (300, 2), (1, 2 * LARGE), (2 * LARGE, LARGE)), 0),
        (Move(1, 7, 0, 0, 1 << 32, (), (), ()), 1),  # a run that no pitch could have
        (Move(1, 7, 0, 0, ROW_BYTES - 1, (2 * MANY,), (ROW,), (ROW,)), 0),
        (Move(1, 7, 0, 0, ROW, (MANY,), (2 * ROW,), (ROW,)), 1),
        (Move(1, 7, 0, 0, ROW, (4, MANY // 4), (MANY * ROW, 2 * ROW), (MANY * ROW // 2, ROW)), 1),  # a layer's experts
        (Move(1, 7, 0, 0, ROW, (3, 4, MANY // 4), (9, MANY * ROW, 2 * ROW), (4 * MANY * ROW, MANY * ROW, ROW)), 3),
        (Move(1, 7, 0, 0, ROW, (4, MANY), (2 * MANY * ROW, 2 * ROW), (MANY * ROW + 1, ROW)), 4),  # not whole rows away
        (Move(1, 7, 0, 0, ROW, (4, MANY), (2 * MANY * ROW - 2 * ROW, 2 * ROW), (MANY * ROW, ROW)), 4),  # layers that overlap
        (Move(1, 7, 0, 0, ROW, (4, MANY // 4), (MANY * ROW, 2 * ROW), (MANY * ROW // 4 + 1, ROW)), 0),
    ],
)
def test_what_the_copy_engine_is_asked_for(move: Move, copies: int) -> None:
    blocks = in_bulk(move, 1000)
    assert len(blocks) == copies
    made = sorted(
        (
            block.source + (layer * block.source_rows + row) * block.source_pitch,
            block.target + (layer * block.target_rows + row) * block.target_pitch,
            block.width,
        )
        for block in blocks
        for layer in range(block.depth)
        for row in range(block.height)
    )
    wanted = sorted(
        (
            move.source + sum(i * s for i, s in zip(index, move.source_strides, strict=True)),
            1000 + sum(i * s for i, s in zip(index, move.target_strides, strict=True)),
            move.run,
        )
        for index in itertools.product(*map(range, move.sizes))
    )
    assert made == (wanted if copies else [])
    for block in blocks:
        assert block.memory == 1
        assert block.width <= min(block.source_pitch, block.target_pitch)
        assert block.height == 1 or max(block.source_pitch, block.target_pitch) <= MAX_PITCH
        assert block.depth == 1 or block.height <= min(block.source_rows, block.target_rows)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize("shift", [0, 16, 8, 2, 1])
def test_the_kernel_in_the_interpreter(shift: int) -> None:
    kernel_matches_copies("cpu", shift, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["cuda", "cpu"])
@pytest.mark.parametrize("shift", [0, 16, 8, 2, 1])
def test_the_kernel_on_a_gpu(shift: int, memory: str) -> None:
    kernel_matches_copies("cuda", shift, memory)


def compiled_ahead(tensors: dict[str, torch.Tensor]) -> Any:
    """What Triton has compiled of the kernel for the device."""
    from checkpoint_engine.devices import compiling
    from checkpoint_engine.loads import kernel, slice_kernel

    compiling._threads.clear()  # of other tests
    for each in (kernel._gather, slice_kernel._sum):
        each.device_caches.clear()
    make_ready(Model(tensors))
    for each in (kernel, slice_kernel):
        compiling.finish(each.compile_for, tensors["moe.w2"].device)
    assert slice_kernel._sum.device_caches[0][0]
    return kernel._gather.device_caches[0][0]


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_replayed_by_one_launch() -> None:
    tensors, fresh = fused("cuda"), fused("cuda")
    plan = record(second_rank_of_two(tensors), [[(n, w.cuda()) for n, w in experts(1)]], tensors)
    memory = Memory(experts(2), "cuda")
    proof = Proof(plan, Model(tensors))
    compiled = compiled_ahead(tensors)
    variants = len(compiled)
    Replayer(plan, Model(tensors)).prepare(memory.sources).replay([memory.raw])
    assert len(compiled) == variants > 0
    second_rank_of_two(fresh)(experts(2))
    assert same(tensors, fresh) and proof.differing() == ["moe.w13", "moe.w2"]
