"""Client of LMDeploy's PyTorch back end, after its documentation ("Updating PyTorch weights with checkpoint-engine").

Checked against a server of the documented request shapes, not against LMDeploy itself. The engine must be started with
`--backend pytorch --distributed-executor-backend ray`, on CUDA, with this package installed beside it.
"""

from __future__ import annotations

import httpx

from checkpoint_engine.engines.base import Handles, PauseMode
from checkpoint_engine.engines.http import HttpEngine
from checkpoint_engine.errors import EngineRefusedError, EngineUnsupportedError


class LMDeploy(HttpEngine):
    """POST /update_weights_from_ipc {"zmq_handles": {uuid: handle}}, which it takes while its KV cache sleeps only.

    So it must be paused, unless it was started with --empty-init and has no weights yet. Pausing is POST /sleep?level=2, which
    finishes running requests, and /wakeup?tags=weights, after which it has memory for weights but none in it; resuming is
    /wakeup?tags=kv_cache, which makes a new cache. abort ends running requests first (POST /abort_request; the engine needs
    --enable-abort-handling). keep is not possible: the cache does not outlive sleep.
    """

    probe_path = "/health"
    resets_cache_itself = True
    pause_drops_weights = True

    def ready(self, response: httpx.Response) -> bool:
        return response.is_success

    def update(self, handles: Handles, *, version: str | None, seconds: float) -> None:
        """LMDeploy has no word for `version`. Raises EngineRefusedError also when it is not ready, or spans other devices."""
        self._check_receiver([device for device, _ in handles], seconds)
        self.succeed(self.request("POST", "/update_weights_from_ipc", {"zmq_handles": dict(handles)}, seconds))

    def _check_receiver(self, devices: list[str], seconds: float) -> None:
        response = self.request("GET", "/update_weights_from_ipc", None, seconds)
        status = self.json(response)
        if not isinstance(status, dict) or status.get("ready") is not True:
            message = status.get("message") if isinstance(status, dict) else None
            raise EngineRefusedError(self.endpoint, response.status_code, f"not ready for weights: {message or response.text}")
        theirs = status.get("device_uuids")
        if theirs is not None and theirs != devices:
            raise EngineRefusedError(
                self.endpoint, response.status_code, f"its workers are on {theirs}, the servers of its ranks on {devices}"
            )

    def pause(self, mode: PauseMode, seconds: float) -> bool:
        if mode == "keep":
            raise EngineUnsupportedError(self.endpoint, "LMDeploy cannot keep running requests: pause with wait or abort")
        if mode == "abort":
            self.request("POST", "/abort_request", {"abort_all": True}, seconds)
        self.request("POST", "/sleep?level=2", {}, seconds)
        self.request("POST", "/wakeup?tags=weights", {}, seconds)
        return True

    def resume(self, seconds: float) -> None:
        self.request("POST", "/wakeup?tags=kv_cache", {}, seconds)
