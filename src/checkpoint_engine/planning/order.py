"""In which order a model's tensors travel, and which of them must travel in one bucket.

Engines hold back a module's weights until the last of them has come, and some take time quadratic in the number of
modules that are half loaded. So tensors travel layer by layer, and within a layer module by module.
"""

from __future__ import annotations

import re

# Each row: modules, children of one parent, whose tensors some loader buffers within one call of `load_weights` and
# loses when the rest comes in another call. Add a row to add a group.
TOGETHER: tuple[tuple[str, ...], ...] = (
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek family: loaders concatenate the two into one parameter
    ("indexer.wk", "indexer.weights_proj"),  # DeepSeek V3.2, GLM 5: dequantised by its scale, then put into one parameter
)

_TOGETHER = re.compile(
    r"(?:^|\.)(?:" + "|".join("(" + "|".join(map(re.escape, row)) + ")" for row in TOGETHER) + r")\.", re.ASCII
)
_NUMBER = re.compile(r"[0-9]+")
_LAYER = re.compile(r"(?:^|\.)[0-9]+(?=\.|$)")


def layer_of(name: str) -> str:
    """The layer a tensor belongs to: its name up to the first component that is a number; "" when there is none.

    >>> layer_of("model.layers.10.mlp.experts.3.up_proj.weight"), layer_of("lm_head.weight")
    ('model.layers.10', '')
    """
    found = _LAYER.search(name)
    return name[: found.end()] if found else ""


def layer_key(name: str) -> tuple[bool, str, str, str, str]:
    """Sorts tensors into the order in which they travel; total: different names have different keys.

    Tensors of no layer come first (embeddings, norms, the head), then layers, numbers in them compared as numbers. The
    tensors of a layer are in natural order of their names, so those of a module, and of an expert, are neighbours.
    """
    layer = layer_of(name)
    return (layer != "", _natural(layer), layer, _natural(name[len(layer) :]), name)


def together(name: str) -> str | None:
    """The group whose tensors must be in one bucket with this one, or None; see TOGETHER.

    A group takes in ALL tensors of its modules (weights, scales, biases). Fusing q_a with kv_a would allow the weights
    and the scales to travel apart, but `indexer.wk` is dequantised with its scale before it is fused. One rule is
    simpler to trust, and costs nothing: scales are a thousandth of their weights.
    """
    found = _TOGETHER.search(name)
    if found is None or found.lastindex is None:
        return None
    return name[: found.start(found.lastindex)] + "+".join(TOGETHER[found.lastindex - 1])


def _natural(text: str) -> str:
    """Text that compares as `text` does, except that runs of up to 20 digits compare as numbers, and that a dot is
    lower than any character of a component: what starts with "a.b." stays together beside "a.b-c."."""
    return _NUMBER.sub(lambda run: run[0].zfill(20), text).replace(".", "\0")
