"""The synthetic checkpoint of the benchmarks: names, shapes and dtypes of a decoder, and what its tensors are filled with."""

from __future__ import annotations

import torch

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def shapes(layers: int, nbytes: int) -> Shapes:
    """A decoder of `layers` layers, about `nbytes` bytes in all: matrices in bf16, norms in fp32."""
    low, high = 1, 1 << 12
    while high - low > 1:  # the width, in steps of 64
        middle = (low + high) // 2
        low, high = (low, middle) if total(_decoder(layers, 64 * middle)) > nbytes else (middle, high)
    return _decoder(layers, 64 * low)


def wide(layers: int, width: int) -> Shapes:
    """A decoder of `layers` layers of this width."""
    return _decoder(layers, width)


def sizes(model: Shapes) -> list[tuple[str, int]]:
    """(name, bytes) of each tensor, in order."""
    return [(name, torch.Size(shape).numel() * dtype.itemsize) for name, (shape, dtype) in model.items()]


def total(model: Shapes) -> int:
    return sum(nbytes for _, nbytes in sizes(model))


def value(name: str) -> float:
    """What a tensor is filled with: another value for most names, exact in bf16."""
    return float(sum(name.encode()) % 251)


def _decoder(layers: int, width: int) -> Shapes:
    bf16, fp32 = torch.bfloat16, torch.float32
    model: Shapes = {"model.embed_tokens.weight": ((16384, width), bf16)}
    for i in range(layers):
        for name, rows, columns in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", width // 4, width),
            ("self_attn.v_proj", width // 4, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", 7 * width // 2, width),
            ("mlp.up_proj", 7 * width // 2, width),
            ("mlp.down_proj", width, 7 * width // 2),
        ):
            model[f"model.layers.{i}.{name}.weight"] = ((rows, columns), bf16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            model[f"model.layers.{i}.{name}.weight"] = ((width,), fp32)
    model["model.norm.weight"] = ((width,), fp32)
    model["lm_head.weight"] = ((16384, width), bf16)
    return model
