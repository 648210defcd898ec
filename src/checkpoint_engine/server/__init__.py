"""The parameter server: one per rank, beside one accelerator."""

from checkpoint_engine.server.parameter_server import ParameterServer
from checkpoint_engine.server.report import StageReport, UpdateReport

__all__ = ["ParameterServer", "StageReport", "UpdateReport"]
