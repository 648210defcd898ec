"""Client of vLLM started with VLLM_SERVER_DEV_MODE=1 and this package's worker extension."""

from __future__ import annotations

import ast
import contextlib
from typing import Any

import httpx

from checkpoint_engine.engines.base import Handles, PauseMode, Weights
from checkpoint_engine.engines.http import HttpEngine
from checkpoint_engine.errors import EngineRefusedError


def rpc_body(handles: dict[str, str], seconds: float) -> dict[str, Any]:
    """What POST /collective_rpc is sent: every worker calls `update_weights_from_ipc` with all handles of the replica."""
    return {"method": "update_weights_from_ipc", "args": [handles], "timeout": seconds}


class Vllm(HttpEngine):
    """POST /collective_rpc, readiness by GET /health.

    The servers tell the workers which version it is; where vLLM publishes one itself (0.32 and later) it is told, too.
    """

    probe_path = "/health"

    def ready(self, response: httpx.Response) -> bool:
        return response.is_success

    def update(self, handles: Handles, *, version: str | None, seconds: float) -> None:
        response = self.request("POST", "/collective_rpc", rpc_body(dict(handles), seconds), seconds)
        failed = [
            f"worker {answer.get('rank', place)}: {answer.get('error')}"
            for place, answer in enumerate(self._results(response))
            if answer is not None and answer.get("ok") is not True
        ]
        if failed:
            raise EngineRefusedError(self.endpoint, response.status_code, "; ".join(failed))

    def weights(self, seconds: float = 10.0) -> Weights | None:
        """What all workers say; dirty if one is, or if they serve different versions. None without the worker extension."""
        body = {"method": "weights_status", "timeout": seconds}
        try:
            response = self.request("POST", "/collective_rpc", body, seconds)
        except EngineRefusedError:
            return None
        answers = self._results(response)
        if not answers or any(answer is None or not isinstance(answer.get("dirty"), bool) for answer in answers):
            raise EngineRefusedError(self.endpoint, response.status_code, f"not the state of weights: {response.text}")
        states = [Weights(answer["version"], answer["dirty"]) for answer in answers if answer is not None]
        return Weights(states[0].version, any(s.dirty for s in states) or len({s.version for s in states}) > 1)

    def publish(self, version: str, seconds: float) -> None:
        self.request_if_there("POST", "/update_weight_version", {"new_version": version}, seconds)

    def pause(self, mode: PauseMode, seconds: float) -> bool:
        """vLLM's modes have the same names, and cached keys and values are dropped with each."""
        self.request("POST", f"/pause?mode={mode}&clear_cache=true", None, seconds)
        return True

    def resume(self, seconds: float) -> None:
        self.request("POST", "/resume", None, seconds)

    def paused(self, seconds: float = 10.0) -> bool | None:
        """None where the server cannot tell."""
        response = self.request_if_there("GET", "/is_paused", None, seconds)
        return None if response is None else bool(self.json(response).get("is_paused"))

    def reset_prefix_cache(self, seconds: float) -> None:
        """Forget keys and values of the old weights; those of running requests are computed again."""
        response = self.request_if_there("POST", "/reset_prefix_cache?reset_running_requests=true", None, seconds)
        if response is None or not response.content:  # 0.26 answers with nothing
            return
        answer = self.json(response)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise EngineRefusedError(self.endpoint, response.status_code, "the prefix cache could not be reset")

    def _results(self, response: httpx.Response) -> list[dict[str, Any] | None]:
        """One answer per worker: a dict, or None from an extension that says nothing. Some versions of vLLM send it as text."""
        if not response.content:
            return []
        results = self.json(response).get("results") or []
        return [self._result(result, response) for result in results]

    def _result(self, result: Any, response: httpx.Response) -> dict[str, Any] | None:
        if isinstance(result, str):
            with contextlib.suppress(ValueError, SyntaxError):
                result = ast.literal_eval(result)
        if result is None or isinstance(result, dict):
            return result
        raise EngineRefusedError(self.endpoint, response.status_code, f"an answer of another shape: {result!r}")
