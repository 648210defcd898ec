"""Qwen3 models for real vLLM: configurations, names and shapes, random checkpoints in bf16 and block-scaled FP8."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

BLOCK = 128
"""Rows and columns of an FP8 weight that share a scale, as in Qwen's and DeepSeek's FP8 checkpoints."""
F8_MAX = 448.0
"""Largest finite number of float8_e4m3fn."""

Spec = tuple[str, tuple[int, ...], torch.dtype]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a Qwen3 or Qwen3-MoE config.json decides about its tensors. experts 0: dense."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inter: int
    vocab: int
    experts: int = 0
    experts_per_token: int = 0
    moe_inter: int = 0
    fp8: bool = False


DENSE = Shape(hidden=1024, layers=8, heads=16, kv_heads=8, head_dim=128, inter=3072, vocab=8192)
EXPERTS = dataclasses.replace(DENSE, layers=4, experts=32, experts_per_token=4, moe_inter=512)
TINY = Shape(hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, inter=256, vocab=512)
TINY_EXPERTS = dataclasses.replace(TINY, experts=8, experts_per_token=2, moe_inter=64)
SHAPES = {
    "dense-bf16": DENSE,
    "moe-bf16": EXPERTS,
    "dense-fp8": dataclasses.replace(DENSE, fp8=True),
    "moe-fp8": dataclasses.replace(EXPERTS, fp8=True),
    "tiny-bf16": TINY,
    # Source: config.json of Qwen/Qwen3-30B-A3B and of Qwen/Qwen3-30B-A3B-FP8.
    "qwen3-30b-a3b": Shape(
        hidden=2048, layers=48, heads=32, kv_heads=4, head_dim=128, inter=6144, vocab=151936,
        experts=128, experts_per_token=8, moe_inter=768,
    ),
}  # fmt: skip
SHAPES["qwen3-30b-a3b-fp8"] = dataclasses.replace(SHAPES["qwen3-30b-a3b"], fp8=True)


def config(shape: Shape) -> dict[str, Any]:
    """config.json."""
    said: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if shape.experts else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if shape.experts else "qwen3",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.inter,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    if shape.experts:
        said |= {
            "moe_intermediate_size": shape.moe_inter,
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.experts_per_token,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
        }
    if shape.fp8:
        routers = [f"model.layers.{layer}.mlp.gate" for layer in range(shape.layers) if shape.experts]
        said["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head", *routers],
        }
    return said


def tensors(shape: Shape) -> Iterator[Spec]:
    """Name, shape and dtype of every tensor of a checkpoint, in the model's order."""
    bf16 = torch.bfloat16
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden), bf16
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (shape.hidden,), bf16
        yield from _linear(shape, f"{at}.self_attn.q_proj", shape.heads * shape.head_dim, shape.hidden)
        yield from _linear(shape, f"{at}.self_attn.k_proj", shape.kv_heads * shape.head_dim, shape.hidden)
        yield from _linear(shape, f"{at}.self_attn.v_proj", shape.kv_heads * shape.head_dim, shape.hidden)
        yield from _linear(shape, f"{at}.self_attn.o_proj", shape.hidden, shape.heads * shape.head_dim)
        yield f"{at}.self_attn.q_norm.weight", (shape.head_dim,), bf16
        yield f"{at}.self_attn.k_norm.weight", (shape.head_dim,), bf16
        yield f"{at}.post_attention_layernorm.weight", (shape.hidden,), bf16
        if shape.experts:
            yield f"{at}.mlp.gate.weight", (shape.experts, shape.hidden), bf16
        blocks = [(f"{at}.mlp.experts.{e}", shape.moe_inter) for e in range(shape.experts)] or [(f"{at}.mlp", shape.inter)]
        for mlp, inter in blocks:
            yield from _linear(shape, f"{mlp}.gate_proj", inter, shape.hidden)
            yield from _linear(shape, f"{mlp}.up_proj", inter, shape.hidden)
            yield from _linear(shape, f"{mlp}.down_proj", shape.hidden, inter)
    yield "model.norm.weight", (shape.hidden,), bf16
    yield "lm_head.weight", (shape.vocab, shape.hidden), bf16


def _linear(shape: Shape, name: str, rows: int, columns: int) -> Iterator[Spec]:
    yield f"{name}.weight", (rows, columns), torch.float8_e4m3fn if shape.fp8 else torch.bfloat16
    if shape.fp8:
        yield f"{name}.weight_scale_inv", (-(-rows // BLOCK), -(-columns // BLOCK)), torch.float32


def random_tensors(shape: Shape, seed: int, device: str) -> dict[str, torch.Tensor]:
    """A checkpoint on the CPU whose answers depend on every layer. FP8: quantized from bf16, block by block."""
    random = torch.Generator(device).manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for name, size, dtype in tensors(shape):
        if name in made:  # scales come with their weight
            continue
        noise = torch.randn(size, generator=random, device=device)
        if len(size) == 1:
            made[name] = (1 + 0.1 * noise).to(dtype).cpu()
        elif dtype is torch.float8_e4m3fn:
            weight, scale = quantize((0.05 * noise).bfloat16())
            made[name], made[f"{name}_scale_inv"] = weight.cpu(), scale.cpu()
        else:
            made[name] = (0.05 * noise).to(dtype).cpu()
    return made


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn and the float32 scale of each block; rows and columns must be multiples of BLOCK."""
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-9) / F8_MAX
    scaled = (blocks / scale[:, None, :, None]).reshape(rows, columns)
    return scaled.to(torch.float8_e4m3fn), scale


def save(folder: Path, shape: Shape, weights: dict[str, torch.Tensor] | None) -> Path:
    """A folder that vLLM serves. weights None: without any, for servers that start from dummy ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1))
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(shape.vocab)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "t0", "eos_token": "t1", "unk_token": "t2", "pad_token": "t3"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    if weights is not None:
        from safetensors.torch import save_file

        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def spoil(weights: dict[str, torch.Tensor], shape: Shape, expert: bool = False) -> tuple[dict[str, torch.Tensor], str]:
    """The checkpoint with a projection in its middle (of attention, or of an expert) half as wide, and that tensor's name."""
    at = f"model.layers.{shape.layers // 2}"
    name = f"{at}.mlp.experts.{shape.experts // 2}.down_proj.weight" if expert else f"{at}.self_attn.o_proj.weight"
    return {**weights, name: weights[name][:, : weights[name].shape[1] // 2].contiguous()}, name
