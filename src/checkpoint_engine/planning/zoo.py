"""Names, shapes and dtypes of real checkpoints, worked out from their published configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from checkpoint_engine.errors import SettingsError
from checkpoint_engine.manifest import Manifest, RankManifest, RegionMeta, TensorMeta

BF16, F8, F32 = "bfloat16", "float8_e4m3fn", "float32"
BLOCK = 128
"""Rows and columns of a weight that share one scale, in checkpoints of block-scaled FP8."""

Spec = tuple[str, str, tuple[int, ...]]
"""Name, dtype, shape."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Multi-head latent attention, as in DeepSeek V2 and later; the sizes have the names of its configuration."""

    q_lora: int = 1536
    kv_lora: int = 512
    nope: int = 128
    rope: int = 64
    v: int = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What of a model's published config.json decides about its tensors.

    inter        of the dense MLPs
    dense_first  layers with a dense MLP before those with experts
    shared       experts that every token passes, stored as one MLP
    gate_bias    the router has a float32 bias for every expert
    latent       attention is latent; kv_heads and head_dim are not used then
    fp8          linear layers are float8 with float32 scales for blocks of 128 x 128
    mtp          layers behind the last that predict further tokens, each with its own embedding and head
    """

    hidden: int
    layers: int
    heads: int
    vocab: int
    inter: int = 0
    experts: int = 0
    moe_inter: int = 0
    dense_first: int = 0
    shared: int = 0
    kv_heads: int = 0
    head_dim: int = 128
    qk_norm: bool = False
    qkv_bias: bool = False
    gate_bias: bool = False
    latent: Latent | None = None
    fp8: bool = False
    mtp: int = 0


_QWEN3 = Config(hidden=0, layers=0, heads=0, vocab=151936, qk_norm=True)

# By the names that are asked for; sources: config.json in each model's repository.
_CONFIGS = {
    "tiny-moe": Config(
        hidden=256, layers=4, heads=8, kv_heads=4, head_dim=64, vocab=1024, experts=8, moe_inter=128, qk_norm=True
    ),
    "qwen3-8b": dataclasses.replace(_QWEN3, hidden=4096, layers=36, heads=32, kv_heads=8, inter=12288),
    "qwen3-30b-a3b": dataclasses.replace(_QWEN3, hidden=2048, layers=48, heads=32, kv_heads=4, experts=128, moe_inter=768),
    "qwen3-32b": dataclasses.replace(_QWEN3, hidden=5120, layers=64, heads=64, kv_heads=8, inter=25600),
    "qwen3-235b-a22b": dataclasses.replace(_QWEN3, hidden=4096, layers=94, heads=64, kv_heads=4, experts=128, moe_inter=1536),
    "glm-4.5-air": Config(
        hidden=4096, layers=46, heads=96, kv_heads=8, vocab=151552, inter=10944, experts=128, moe_inter=1408,
        dense_first=1, shared=1, qkv_bias=True, gate_bias=True, mtp=1,
    ),
    "deepseek-v3.1": Config(
        hidden=7168, layers=61, heads=128, vocab=129280, inter=18432, experts=256, moe_inter=2048,
        dense_first=3, shared=1, gate_bias=True, latent=Latent(), fp8=True, mtp=1,
    ),
    "kimi-k2": Config(
        hidden=7168, layers=61, heads=64, vocab=163840, inter=18432, experts=384, moe_inter=2048,
        dense_first=1, shared=1, gate_bias=True, latent=Latent(), fp8=True,
    ),
}  # fmt: skip

NAMES = tuple(_CONFIGS)


def config(model: str) -> Config:
    """Raises SettingsError that lists the names when there is no `model`."""
    try:
        return _CONFIGS[model]
    except KeyError:
        raise SettingsError(f"no model {model!r}; known are {', '.join(NAMES)}") from None


def checkpoint(model: str) -> Manifest:
    """The whole checkpoint as one rank would hold it: one region, tensors in the model's order without gaps.

    Raises SettingsError when there is no `model`.
    """
    tensors, offset = [], 0
    for name, dtype, shape in _model(config(model)):
        tensors.append(TensorMeta(name, dtype, shape, offset))
        offset += tensors[-1].nbytes
    return Manifest(model, (RankManifest(0, "", "", (RegionMeta(offset, tuple(tensors)),)),))


def _model(c: Config) -> Iterator[Spec]:
    yield "model.embed_tokens.weight", BF16, (c.vocab, c.hidden)
    for layer in range(c.layers):
        yield from _layer(c, f"model.layers.{layer}", layer >= c.dense_first and c.experts > 0)
    yield "model.norm.weight", BF16, (c.hidden,)
    yield "lm_head.weight", BF16, (c.vocab, c.hidden)
    for layer in range(c.layers, c.layers + c.mtp):
        at = f"model.layers.{layer}"
        yield f"{at}.embed_tokens.weight", BF16, (c.vocab, c.hidden)
        yield f"{at}.enorm.weight", BF16, (c.hidden,)
        yield f"{at}.hnorm.weight", BF16, (c.hidden,)
        yield f"{at}.eh_proj.weight", BF16, (c.hidden, 2 * c.hidden)
        yield from _layer(c, at, c.experts > 0)
        yield f"{at}.shared_head.norm.weight", BF16, (c.hidden,)
        yield f"{at}.shared_head.head.weight", BF16, (c.vocab, c.hidden)


def _layer(c: Config, at: str, sparse: bool) -> Iterator[Spec]:
    yield f"{at}.input_layernorm.weight", BF16, (c.hidden,)
    yield f"{at}.post_attention_layernorm.weight", BF16, (c.hidden,)
    yield from _latent(c, c.latent, f"{at}.self_attn") if c.latent else _attention(c, f"{at}.self_attn")
    if not sparse:
        yield from _mlp(c, f"{at}.mlp", c.inter)
        return
    yield f"{at}.mlp.gate.weight", BF16, (c.experts, c.hidden)
    if c.gate_bias:
        yield f"{at}.mlp.gate.e_score_correction_bias", F32, (c.experts,)
    for expert in range(c.experts):
        yield from _mlp(c, f"{at}.mlp.experts.{expert}", c.moe_inter)
    if c.shared:
        yield from _mlp(c, f"{at}.mlp.shared_experts", c.shared * c.moe_inter)


def _attention(c: Config, at: str) -> Iterator[Spec]:
    for name, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)):
        yield from _linear(c, f"{at}.{name}_proj", heads * c.head_dim, c.hidden)
        if c.qkv_bias:
            yield f"{at}.{name}_proj.bias", BF16, (heads * c.head_dim,)
    yield from _linear(c, f"{at}.o_proj", c.hidden, c.heads * c.head_dim)
    if c.qk_norm:
        yield f"{at}.q_norm.weight", BF16, (c.head_dim,)
        yield f"{at}.k_norm.weight", BF16, (c.head_dim,)


def _latent(c: Config, a: Latent, at: str) -> Iterator[Spec]:
    yield from _linear(c, f"{at}.q_a_proj", a.q_lora, c.hidden)
    yield f"{at}.q_a_layernorm.weight", BF16, (a.q_lora,)
    yield from _linear(c, f"{at}.q_b_proj", c.heads * (a.nope + a.rope), a.q_lora)
    yield from _linear(c, f"{at}.kv_a_proj_with_mqa", a.kv_lora + a.rope, c.hidden)
    yield f"{at}.kv_a_layernorm.weight", BF16, (a.kv_lora,)
    yield from _linear(c, f"{at}.kv_b_proj", c.heads * (a.nope + a.v), a.kv_lora)
    yield from _linear(c, f"{at}.o_proj", c.hidden, c.heads * a.v)


def _mlp(c: Config, at: str, inter: int) -> Iterator[Spec]:
    for name in ("gate", "up"):
        yield from _linear(c, f"{at}.{name}_proj", inter, c.hidden)
    yield from _linear(c, f"{at}.down_proj", c.hidden, inter)


def _linear(c: Config, at: str, rows: int, columns: int) -> Iterator[Spec]:
    yield f"{at}.weight", F8 if c.fp8 else BF16, (rows, columns)
    if c.fp8:
        yield f"{at}.weight_scale_inv", F32, (-(-rows // BLOCK), -(-columns // BLOCK))
