"""Inference engines: how each is asked to update, and a small one of our own (`engines.embedded`)."""

from checkpoint_engine.engines.base import Engine, Weights, get_engine, request_for_rank

__all__ = ["Engine", "Weights", "get_engine", "request_for_rank"]
