"""Which way new weights may take into each layer of a vLLM model. Pure: facts in, decision and reason out."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Way(enum.Enum):
    """BARE     the layer's own loaders write into the live parameters, and that is all
    REFRESH  the same, then the layer's post-processing once more: it derives something from parameters that it leaves alone
    STAGE    load into a fresh copy of the checkpoint's layout, post-process it, copy the result into the live storage"""

    BARE = "bare"
    REFRESH = "refresh"
    STAGE = "stage"


class LayerFacts(NamedTuple):
    """What is asked of a layer.

    method   qualified class name of its quant_method; None: it has none, and nothing is done to it after loading
    device   "cuda", "rocm", "cpu", ...
    backend  name of the kernels chosen for experts ("TRITON", ...); None elsewhere
    scales   the method only adds scales to an attention layer
    """

    method: str | None
    device: str
    backend: str | None = None
    scales: bool = False


LINEAR = "vllm.model_executor.layers.linear.UnquantizedLinearMethod"
EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding.UnquantizedEmbeddingMethod"
EXPERTS = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod"
# Read in 0.26, 0.32 and 0.33: on CUDA these keep the checkpoint's layout of experts.
PLAIN_EXPERT_KERNELS = frozenset({"TRITON", "BATCHED_TRITON"})


def choose_way(layer: LayerFacts) -> tuple[Way, str]:
    """How to load a layer of these facts, and why. What is not known to be left alone by post-processing is staged."""
    if layer.method is None:
        return Way.BARE, "nothing is done to it after loading"
    if layer.scales:
        return Way.BARE, "its scales are created anew for loading and consumed after it"
    if layer.method == LINEAR and layer.device == "cuda":
        return Way.BARE, "on CUDA the unquantized weight is used as it is in the checkpoint"
    if layer.method == EMBEDDING and layer.device == "cuda":
        return Way.BARE, "on CUDA the table is used as it is in the checkpoint"
    if layer.method == EMBEDDING and layer.device == "cpu":
        return Way.REFRESH, "on a CPU a packed copy is made of the table, which stays"
    if layer.method == EXPERTS and layer.device == "cuda" and layer.backend in PLAIN_EXPERT_KERNELS:
        return Way.BARE, f"{layer.backend} kernels use unquantized experts as they are in the checkpoint"
    return Way.STAGE, f"{layer.method.rpartition('.')[2]} may change weights after loading on {layer.device}"
