"""Client of SGLang, and of the embedded engine, which takes requests of the same shape."""

from __future__ import annotations

import httpx

from checkpoint_engine.engines.base import Handles, Weights
from checkpoint_engine.engines.http import HttpEngine
from checkpoint_engine.errors import EngineRefusedError


class SGLang(HttpEngine):
    """POST /update_weights_from_ipc {"zmq_handles": {uuid: handle}, "flush_cache": true, "weight_version": version}."""

    probe_path = "/ping"

    def ready(self, response: httpx.Response) -> bool:
        # 503: SGLang was started to wait for its first weights, and waits.
        return response.is_success or response.status_code == 503

    def update(self, handles: Handles, *, version: str | None, seconds: float) -> None:
        body = {"zmq_handles": dict(handles), "flush_cache": True, "weight_version": version}
        response = self.request("POST", "/update_weights_from_ipc", body, seconds)
        answer = self.json(response)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            message = answer.get("message") if isinstance(answer, dict) else None
            raise EngineRefusedError(self.endpoint, response.status_code, str(message or response.text))

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
