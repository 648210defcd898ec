"""Client of vLLM started with VLLM_SERVER_DEV_MODE=1 and this package's worker extension."""

from __future__ import annotations

from typing import Any

import httpx

from checkpoint_engine.engines.base import Handles
from checkpoint_engine.engines.http import HttpEngine


def rpc_body(handles: dict[str, str], seconds: float) -> dict[str, Any]:
    """What POST /collective_rpc is sent: every worker calls `update_weights_from_ipc` with all handles of the replica."""
    return {"method": "update_weights_from_ipc", "args": [handles], "timeout": seconds}


class Vllm(HttpEngine):
    """POST /collective_rpc, readiness by GET /health. The version is not sent: the servers tell the workers."""

    probe_path = "/health"

    def ready(self, response: httpx.Response) -> bool:
        return response.is_success

    def update(self, handles: Handles, *, version: str | None, seconds: float) -> None:
        self.request("POST", "/collective_rpc", rpc_body(dict(handles), seconds), seconds)
