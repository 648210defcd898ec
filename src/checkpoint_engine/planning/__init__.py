"""Pure planning: from a manifest and sizes to who brings in which bytes, in which order, to which place."""

from checkpoint_engine.planning.plan import Bucket, Copy, Item, Piece, Plan

__all__ = ["Bucket", "Copy", "Item", "Piece", "Plan"]
