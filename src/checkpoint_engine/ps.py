"""The contract's import path of ParameterServer."""

from __future__ import annotations

from checkpoint_engine.server import ParameterServer

__all__ = ["ParameterServer"]
