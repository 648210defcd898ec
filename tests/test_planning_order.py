from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.planning import layer_key, layer_of, together

NAMES = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(["model", "layers", "0", "2", "10", "02", "a", "a-b", "experts", "weight", "", "\0", "٣"])).map(
        ".".join
    ),
)


def test_natural_order_of_layers_and_experts() -> None:
    wanted = [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.2.mlp.experts.2.up_proj.weight",
        "model.layers.2.mlp.experts.10.down_proj.weight",
        "model.layers.2.mlp.experts.10.up_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.10.mlp.experts.0.up_proj.weight",
    ]
    shuffled = random.Random(1).sample(wanted, len(wanted))
    assert sorted(shuffled, key=layer_key) == wanted


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.10.mlp.experts.3.up_proj.weight", "model.layers.10"),
        ("encoder.layer.0.output.dense.bias", "encoder.layer.0"),
        ("layer1.0.conv1.weight", "layer1.0"),
        ("0.weight", "0"),
        ("lm_head.weight", ""),
        ("", ""),
    ],
)
def test_layer(name: str, layer: str) -> None:
    assert layer_of(name) == layer


@given(st.lists(NAMES, unique=True, max_size=30), st.randoms(use_true_random=False))
def test_order_is_total_and_keeps_layers_whole(names: list[str], rng: random.Random) -> None:
    wanted = sorted(names, key=layer_key)
    shuffled = list(names)
    rng.shuffle(shuffled)
    assert sorted(shuffled, key=layer_key) == wanted
    layers = [layer_of(name) for name in wanted]
    assert len([a for a, b in itertools.pairwise(layers) if a != b]) == max(0, len(set(layers)) - 1)


def test_numbers_of_any_length() -> None:
    long = "9" * 6000  # more digits than int() takes
    assert sorted([f"a.{long}", "a.10", "a.9"], key=layer_key)[:2] == ["a.9", "a.10"]


def test_groups_that_load_together() -> None:
    mla = "model.layers.3.self_attn."
    fused = {together(mla + m + p) for m in ("q_a_proj", "kv_a_proj_with_mqa") for p in (".weight", ".weight_scale_inv")}
    indexer = {together(mla + f"indexer.{t}") for t in ("wk.weight", "wk.weight_scale_inv", "weights_proj.weight")}
    assert len(fused) == len(indexer) == 1
    assert None not in fused | indexer
    assert fused != indexer
    assert together("model.layers.4.self_attn.q_a_proj.weight") not in fused
    assert together("q_a_proj.weight") == together("kv_a_proj_with_mqa.weight") is not None
    for name in ("q_a_layernorm.weight", "kv_b_proj.weight", "indexer.wq_b.weight", "indexer.k_norm.bias", "wk.weight"):
        assert together(mla + name) is None


@given(NAMES)
def test_together_takes_any_name(name: str) -> None:
    together(name)
