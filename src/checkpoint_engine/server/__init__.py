"""The parameter server: one per rank, beside one accelerator."""

from checkpoint_engine.server.parameter_server import ParameterServer
from checkpoint_engine.server.report import StageReport, UpdateReport
from checkpoint_engine.server.rollout import ReplicaReport, RolloutReport

__all__ = ["ParameterServer", "ReplicaReport", "RolloutReport", "StageReport", "UpdateReport"]
