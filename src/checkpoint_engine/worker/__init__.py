"""What runs inside an engine's worker process: the receiving end of a session."""

from checkpoint_engine.loads.recordable import Recordable
from checkpoint_engine.worker.session import update_weights_from_ipc
from checkpoint_engine.worker.state import WeightsState, weights_state
from checkpoint_engine.worker.vllm import VllmColocateWorkerExtension

__all__ = ["Recordable", "VllmColocateWorkerExtension", "WeightsState", "update_weights_from_ipc", "weights_state"]
