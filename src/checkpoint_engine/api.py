"""The contract's function by which a server asks vLLM's workers to update."""

from __future__ import annotations

from checkpoint_engine.engines.vllm import Vllm, rpc_body


def request_inference_to_update(url: str, socket_paths: dict[str, str], timeout: float = 300.0, uds: str | None = None) -> None:
    """POST {"method": "update_weights_from_ipc", "args": [socket_paths], "timeout": timeout} to `url`.

    url: the whole of it, with its path (`http://host:port/collective_rpc`); socket_paths: device uuid -> handle; timeout:
    seconds; uds: a Unix socket to connect to instead of the URL's host and port.

    Raises EngineUnreachableError, EngineRefusedError (any answer but 2xx) or DeadlineError, all of them RuntimeErrors;
    SettingsError when `url` is none.
    """
    with Vllm(url, uds=uds) as engine:
        engine.request("POST", "", rpc_body(socket_paths, timeout), timeout)
