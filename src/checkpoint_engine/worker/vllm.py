"""The class that `vllm serve --worker-extension-cls` mixes into vLLM's workers."""

from __future__ import annotations

from typing import Any

from checkpoint_engine.worker.session import update_weights_from_ipc


class VllmColocateWorkerExtension:
    """Adds `update_weights_from_ipc` to a vLLM worker; called on each through /collective_rpc."""

    device: Any
    local_rank: int
    model_runner: Any

    def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> None:
        """zmq_handles: device uuid -> handle, of all workers of this engine. Raises WorkerUpdateError."""
        from checkpoint_engine.devices import get_device

        index = self.device.index if self.device.type == "cuda" else self.local_rank
        device = get_device(self.device.type, index)
        handle = zmq_handles[device.uuid] if device.uuid in zmq_handles else list(zmq_handles.values())[self.local_rank]
        update_weights_from_ipc(None, handle, index, run=self.model_runner.model.load_weights)
