"""Inference engines: how each is asked to update, and a small one of our own (`engines.embedded`)."""

from checkpoint_engine.engines.base import ENGINES, Engine, PauseMode, Weights, get_engine, request_for_rank
from checkpoint_engine.engines.rollout import Policy

__all__ = ["ENGINES", "Engine", "PauseMode", "Policy", "Weights", "get_engine", "request_for_rank"]
