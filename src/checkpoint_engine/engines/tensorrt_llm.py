"""Client of `trtllm-serve` with its Ray orchestrator, after the request shapes in its source (UpdateWeightsRequest).

Checked against a server of these shapes, not against TensorRT-LLM itself.

What the engine needs: its own `WorkerExtension.update_weights` reads serialised CUDA IPC tuples out of `weights`, one bucket a
call, so `ray_worker_extension_cls` must name a subclass whose `update_weights(weights: dict[str, str])` passes this worker's
handle to `checkpoint_engine.worker.update_weights_from_ipc`, with `run` reloading a bucket (`model_loader.reload(...,
allow_partial_loading=True)` after each module's `pre_reload_weights`) and `post_hook` doing what the base class does for
`update_weights(None)`. Such a class is not part of this package, because none could be run here.
"""

from __future__ import annotations

import httpx

from checkpoint_engine.engines.base import Handles, PauseMode
from checkpoint_engine.engines.http import HttpEngine
from checkpoint_engine.errors import EngineRefusedError, EngineUnsupportedError


class TensorRTLLM(HttpEngine):
    """POST /update_weights {"weights": {uuid: handle}}: every worker's extension gets it once running requests are done.

    That is pause mode wait, and the only one over HTTP: `pause_generation` is a method of AsyncLLM that no route reaches. The
    extension's post-processing forgets the prefix cache, as its base class does. There is no word for the version.
    """

    probe_path = "/health"
    resets_cache_itself = True

    def ready(self, response: httpx.Response) -> bool:
        return response.is_success

    def update(self, handles: Handles, *, version: str | None, seconds: float) -> None:
        response = self.request("POST", "/update_weights", {"weights": dict(handles)}, seconds)
        answer = self.json(response)
        if not isinstance(answer, dict) or answer.get("status") != "success":
            raise EngineRefusedError(self.endpoint, response.status_code, response.text)

    def pause(self, mode: PauseMode, seconds: float) -> bool:
        if mode == "wait":
            return False
        raise EngineUnsupportedError(self.endpoint, f"TensorRT-LLM has no route to pause with {mode}: use wait")
