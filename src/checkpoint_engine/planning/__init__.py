"""Pure planning: from a manifest and sizes to who brings in which bytes, in which order, to which place."""

from checkpoint_engine.planning.buckets import plan_broadcast
from checkpoint_engine.planning.cost import CPU, H200, Prediction, Rates, predict
from checkpoint_engine.planning.order import layer_key, layer_of, together
from checkpoint_engine.planning.plan import ALIGNMENT, Bucket, Copy, Item, Piece, Plan
from checkpoint_engine.planning.sizes import Sizes, default_sizes
from checkpoint_engine.planning.stripe import stripe

__all__ = [
    "ALIGNMENT",
    "CPU",
    "H200",
    "Bucket",
    "Copy",
    "Item",
    "Piece",
    "Plan",
    "Prediction",
    "Rates",
    "Sizes",
    "default_sizes",
    "layer_key",
    "layer_of",
    "plan_broadcast",
    "predict",
    "stripe",
    "together",
]
