"""Attention layers of a vLLM model: post-processed after all others, with scales that are made anew for every loading."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import torch

SCALES = ("q_scale", "k_scale", "v_scale", "prob_scale")


def is_attention(layer: torch.nn.Module) -> bool:
    """Whether vLLM post-processes it by itself, after all other layers."""
    attention = import_module("vllm.model_executor.layers.attention")
    if hasattr(attention, "is_deferred_attention_layer"):  # not in 0.26
        return bool(attention.is_deferred_attention_layer(layer))
    return isinstance(layer, (attention.Attention, attention.MLAAttention))


def has_scales(layer: torch.nn.Module) -> bool:
    method = import_module("vllm.model_executor.layers.quantization.kv_cache").BaseKVCacheMethod
    return isinstance(getattr(layer, "quant_method", None), method)


def scale_parameters(layer: torch.nn.Module) -> Iterator[torch.Tensor]:
    return (getattr(layer, name) for name in SCALES if name in layer._parameters)


def drop_scales(layer: torch.nn.Module) -> None:
    for name in SCALES:
        if name in layer._parameters:
            delattr(layer, name)
