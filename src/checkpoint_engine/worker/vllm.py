"""The class that `vllm serve --worker-extension-cls` mixes into vLLM's workers."""

from __future__ import annotations

import logging
import time
from importlib import import_module
from typing import Any

import torch

from checkpoint_engine.errors import SettingsError
from checkpoint_engine.worker.session import update_weights_from_ipc
from checkpoint_engine.worker.state import WeightsState
from checkpoint_engine.worker.vllm_models import Models

log = logging.getLogger(__name__)


class VllmColocateWorkerExtension:
    """Adds `update_weights_from_ipc` and `weights_status` to a vLLM worker (0.26 to 0.33), each called through /collective_rpc.

    Neither raises: vLLM's executor would leave the other workers' answers in its queue, and take them for answers to later
    calls. What failed is in the answer's "error", and was told to the server, too.
    """

    # Set by vLLM's worker; names of our own begin with checkpoint_engine, because vLLM refuses names that it has itself.
    device: Any
    rank: int
    local_rank: int
    vllm_config: Any
    model_config: Any
    model_runner: Any

    def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> dict[str, Any]:
        """Take one update. zmq_handles: device uuid -> handle, of all workers of this engine in rank order.

        Returns what `weights_status` does, "ok", "error" (None when ok) and "seconds" for all of it.
        """
        start = time.perf_counter()
        error = None
        try:
            vars(self)["_checkpoint_engine_last"] = self._checkpoint_engine_update(zmq_handles)
        except Exception as e:
            log.exception("checkpoint-engine: the update failed on rank %d", self.rank)
            error = str(e) or type(e).__name__
        return {**self.weights_status(), "ok": error is None, "error": error, "seconds": time.perf_counter() - start}

    def weights_status(self) -> dict[str, Any]:
        """{"rank", "version", "dirty"}: what this worker serves; and of its last good update what `Models.report` says."""
        version, dirty = self._checkpoint_engine_state().read()
        last: dict[str, Any] = vars(self).get("_checkpoint_engine_last", {})
        return {"rank": self.rank, "version": version, "dirty": dirty, **last}

    def _checkpoint_engine_state(self) -> WeightsState:
        state: WeightsState = vars(self).setdefault("_checkpoint_engine_weights", WeightsState())
        return state

    def _checkpoint_engine_update(self, zmq_handles: dict[str, str]) -> dict[str, Any]:
        index, handle = self._checkpoint_engine_place(zmq_handles)
        state = self._checkpoint_engine_state()
        models = Models(self)
        configured = import_module("vllm.config").set_current_vllm_config
        with configured(self.vllm_config), torch.no_grad():
            try:
                options: dict[str, Any] = {"run": models.load, "post_hook": models.finish, "model": models.recordable}
                update_weights_from_ipc(None, handle, index, state=state, **options)
            except BaseException:
                models.abort()
                raise
        return models.report()

    def _checkpoint_engine_place(self, zmq_handles: dict[str, str]) -> tuple[int, str]:
        """This worker's device number and handle: by the GPU's uuid, or on a CPU, which has none, by its rank in the engine."""
        if self.device.type == "cuda":
            from checkpoint_engine.devices import get_device

            uuid = get_device("cuda", self.device.index).uuid
            if uuid not in zmq_handles:
                raise SettingsError(f"no handle for rank {self.rank}'s {uuid}, only for {', '.join(zmq_handles)}")
            return self.device.index, zmq_handles[uuid]
        handles = list(zmq_handles.values())
        if not 0 <= self.rank < len(handles):
            raise SettingsError(f"no handle for rank {self.rank}: there are {len(handles)}")
        return self.local_rank, handles[self.rank]
