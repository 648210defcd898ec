"""What the benchmark with real vLLM servers is sure of without them: shapes, quantization, digests, and what it calls wrong."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from real_vllm import models
from real_vllm.extension import digest
from real_vllm.judge import Row, judge, table

from checkpoint_engine.planning.zoo import checkpoint


def test_qwen3_30b_a3b_has_the_tensors_of_its_checkpoint() -> None:
    known = {(t.name, t.shape, t.dtype) for rank in checkpoint("qwen3-30b-a3b").ranks for r in rank.regions for t in r.tensors}
    assert {(n, s, str(d).removeprefix("torch.")) for n, s, d in models.tensors(models.SHAPES["qwen3-30b-a3b"])} == known


FEW_EXPERTS = dataclasses.replace(models.EXPERTS, hidden=256, layers=2, heads=2, kv_heads=1, experts=2, moe_inter=128, vocab=64)


@pytest.mark.parametrize("shape", [models.TINY, dataclasses.replace(FEW_EXPERTS, fp8=True)], ids=["dense-bf16", "moe-fp8"])
def test_random_checkpoints_are_as_their_shape_says(shape: models.Shape) -> None:
    made = models.random_tensors(shape, 0, "cpu")
    assert {name: (tuple(t.shape), t.dtype) for name, t in made.items()} == {n: (s, d) for n, s, d in models.tensors(shape)}
    for expert in {False, shape.experts > 0}:
        spoilt, name = models.spoil(made, shape, expert)
        assert ("experts" in name) == expert
        assert [n for n in made if spoilt[n].shape != made[n].shape] == [name]


def test_quantized_blocks_are_close() -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 384)
    quantized, scale = models.quantize(weight)
    assert scale.shape == (2, 3)
    back = quantized.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    largest = weight.reshape(2, 128, 3, 128).abs().amax((1, 3)).repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert bool(((back - weight).abs() <= weight.abs() / 16 + largest / 448).all())  # 3 bits of mantissa


@given(st.binary(min_size=1, max_size=100), st.data())
def test_a_digest_depends_on_every_byte_and_its_place(content: bytes, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[place] ^= data.draw(st.integers(1, 255))

    def of(some: bytes | bytearray) -> str:
        return digest(torch.frombuffer(bytearray(some), dtype=torch.uint8))

    assert of(content) == of(bytearray(content))
    assert of(content) != of(flipped)
    assert (of(content) == of(content[::-1])) == (content == content[::-1])


def test_a_digest_is_of_the_elements_not_of_the_layout() -> None:
    tensor = torch.arange(30, dtype=torch.float32).reshape(5, 6)
    assert digest(tensor.t().contiguous().t()) == digest(tensor)
    assert digest(tensor[1:4]) == digest(tensor[1:4].clone())


def good() -> dict[str, Any]:
    """A run in which everything is right: A, then a spoiled B."""
    a, b = {"answers": [[1, 2]], "parameters": [{"w": ["aa", 64]}]}, {"answers": [[3, 4]], "parameters": [{"w": ["bb", 64]}]}
    status = {"rank": 0, "version": "A0", "dirty": False, "layers": {"bare": 3}, "staged_peak_bytes": 1 << 20}
    report = {"seconds": 0.5, "stages": {"load_weights": {"seconds": 0.25}}, "pause_ms": 750.0, "ways": ["replayed"]}
    start = {"answers": [[0, 0]], "parameters": [{"w": ["00", 64]}]}
    step = {"version": "A0", "by": "push", "checkpoint": "A", "report": report, "status": [status], **a}
    step |= {"answered": 2, "failed": []}
    bad = {"version": "bad1", "by": "push", "checkpoint": "bad", "bad": "w", "error": "tensor 'w': too narrow"}
    return {"steps": [start, step, {**bad, "status": [{**status, "dirty": True}]}], "expected": {"A": copy.deepcopy(a), "B": b}}


def judged(seen: dict[str, Any]) -> Row:
    return judge("dense", 1, 30.0, **seen)


def test_a_good_run_is_not_called_wrong() -> None:
    row = judged(good())
    assert row.wrong == ()
    assert row.cells == (
        "dense",
        "1",
        "3 bare",
        "1/1",
        "30",
        "0.500",
        "0.250",
        "0.750",
        "1.0",
        "1/1",
        "1/1",
        "0",
        "1/1",
        "2 ok, 0 failed",
    )
    assert "WRONG" not in table([row])


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tokens": lambda s: s["steps"][1].update(answers=[[1, 3]]),
    "parameters differ": lambda s: s["steps"][1]["parameters"][0].update(w=["ab", 64]),
    "first ['0: more']": lambda s: s["steps"][1]["parameters"][0].update(more=["aa", 8]),
    "parameters moved": lambda s: s["steps"][1]["parameters"][0].update(w=["aa", 128]),
    "A0 (push): lost": lambda s: s["steps"][1].update(error="lost"),
    "status": lambda s: s["steps"][1]["status"][0].update(version="A1"),
    "was taken": lambda s: s["steps"][2].pop("error"),
    "does not name": lambda s: s["steps"][2].update(error="some tensor"),
    "no worker is dirty": lambda s: s["steps"][2]["status"][0].update(dirty=False),
    "in flight failed": lambda s: s["steps"][1].update(failed=["too late"]),
    "no request": lambda s: s["steps"][1].update(answered=0),
    "same answers": lambda s: s["expected"]["B"].update(answers=[[1, 2]]),
    "before any update": lambda s: s["steps"][0].update(answers=[[3, 4]]),
}


@pytest.mark.parametrize("told", CHANGES)
def test_what_is_wrong_is_told(told: str) -> None:
    seen = copy.deepcopy(good())
    CHANGES[told](seen)
    row = judged(seen)
    assert any(told in problem for problem in row.wrong), row.wrong
    assert "WRONG dense tp=1" in table([row])
