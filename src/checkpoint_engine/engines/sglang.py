"""Client of SGLang, and of the embedded engine, which takes requests of the same shape."""

from __future__ import annotations

import httpx

from checkpoint_engine.engines.base import Handles, PauseMode, Weights
from checkpoint_engine.engines.http import HttpEngine
from checkpoint_engine.errors import EngineRefusedError


class SGLang(HttpEngine):
    """POST /update_weights_from_ipc {"zmq_handles": {uuid: handle}, "flush_cache": true, "weight_version": version}.

    It drops its radix cache and publishes the version as part of that. Pauses are POST /pause_generation {"mode"}:
    keep is SGLang's "retract" (running requests go back to the queue; their keys and values are computed again, by the new
    weights), abort its "abort". Its "in_place" is not used: it keeps keys and values of the old weights, and the update's
    flush fails. It has no word for wait; its update does that by itself when it is not paused: it waits for running requests
    and holds new ones off.
    """

    probe_path = "/ping"
    resets_cache_itself = True

    def ready(self, response: httpx.Response) -> bool:
        # 503: SGLang was started to wait for its first weights, and waits.
        return response.is_success or response.status_code == 503

    def update(self, handles: Handles, *, version: str | None, seconds: float) -> None:
        body = {"zmq_handles": dict(handles), "flush_cache": True, "weight_version": version}
        self.succeed(self.request("POST", "/update_weights_from_ipc", body, seconds))

    def pause(self, mode: PauseMode, seconds: float) -> bool:
        if mode == "wait":
            return False
        self.request("POST", "/pause_generation", {"mode": "retract" if mode == "keep" else "abort"}, seconds)
        return True

    def resume(self, seconds: float) -> None:
        self.request("POST", "/continue_generation", {}, seconds)

    def reset_prefix_cache(self, seconds: float) -> None:
        """POST /flush_cache; SGLang refuses (400) while requests run."""
        self.request("POST", "/flush_cache", None, seconds)

    def weights(self, seconds: float = 10.0) -> Weights | None:
        """Asked of GET /v1/weights, which the embedded engine has; None from an engine that has no such route."""
        try:
            response = self.request("GET", "/v1/weights", None, seconds)
        except EngineRefusedError as e:
            if e.status == 404:
                return None
            raise
        answer = self.json(response)
        if not isinstance(answer, dict) or not isinstance(answer.get("dirty"), bool):
            raise EngineRefusedError(self.endpoint, response.status_code, f"not the state of weights: {response.text}")
        return Weights(answer.get("version"), answer["dirty"])
