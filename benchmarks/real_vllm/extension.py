"""vLLM worker extension: the implementation's own, and what a benchmark needs inside the worker. Any implementation's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from checkpoint_engine.worker import VllmColocateWorkerExtension, update_weights_from_ipc

CHUNK = 1 << 23
"""Words of 8 bytes that are digested at once: bounds the memory that it takes."""


class Extension(VllmColocateWorkerExtension):
    def bench_plain(self, zmq_handles: dict[str, str]) -> dict[str, Any]:
        """An update through the model's bare load_weights, timed."""
        model = self.model_runner.get_model()
        return self._bench_timed(zmq_handles, lambda: None, model.load_weights, lambda: None)

    def bench_recorded(self, zmq_handles: dict[str, str]) -> Any:
        """The extension's own way, with recorded loads, which only ours has. They stay on for what comes after it."""
        os.environ["CHECKPOINT_ENGINE_RECORDED_LOADS"] = "on"
        return self.update_weights_from_ipc(zmq_handles)

    def bench_layerwise(self, zmq_handles: dict[str, str]) -> dict[str, Any]:
        """An update through vLLM's own layerwise reload. It keeps references to tensors, so each is cloned."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            return self._bench_timed(
                zmq_handles,
                lambda: initialize_layerwise_reload(model),
                lambda weights: model.load_weights([(name, tensor.clone()) for name, tensor in weights]),
                lambda: finalize_layerwise_reload(model, self.model_config),
            )

    def _bench_timed(
        self, handles: dict[str, str], begin: Callable[[], None], load: Callable[..., Any], end: Callable[[], None]
    ) -> dict[str, Any]:
        import zmq
        from vllm.platforms import current_platform

        inside, calls, tensors, start = 0.0, 0, 0, time.perf_counter()

        def run(weights: Any) -> None:
            nonlocal inside, calls, tensors
            begun = time.perf_counter()
            load(weights)
            torch.cuda.synchronize()
            inside, calls, tensors = inside + time.perf_counter() - begun, calls + 1, tensors + len(weights)

        handle = handles[current_platform.get_device_uuid(self.device.index)]
        begin()
        with zmq.Context() as context:
            update_weights_from_ipc(context, handle, device_id=self.device.index, run=run, post_hook=end)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "inside": inside, "calls": calls, "tensors": tensors}

    def bench_zero(self) -> dict[str, Any]:
        """Overwrite all parameters, so that what is there after the next update was put there by it."""
        with torch.no_grad():
            for parameter in self.model_runner.get_model().parameters():
                parameter.zero_()
        return {}

    def bench_parameters(self) -> dict[str, Any]:
        """name -> [digest of its bytes, address] of every parameter."""
        with torch.no_grad():
            named = self.model_runner.get_model().named_parameters()
            return {name: [digest(parameter), parameter.data_ptr()] for name, parameter in named}

    def bench_digest(self) -> dict[str, Any]:
        """{"digest": one of all parameters}."""
        import hashlib

        found = {name: seen for name, (seen, _) in self.bench_parameters().items()}
        return {"digest": hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]}


def digest(tensor: torch.Tensor) -> str:
    """16 hex digits that depend on every byte and its place, computed where the tensor is."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    tail = torch.zeros(8, dtype=torch.uint8, device=data.device)
    tail[: data.numel() - whole] = data[whole:]
    total = _mixed(tail.view(torch.int64), whole // 8)
    for start in range(0, whole // 8, CHUNK):
        stop = min(start + CHUNK, whole // 8)
        part = data[8 * start : 8 * stop]
        total += _mixed(part.view(torch.int64) if part.storage_offset() % 8 == 0 else part.clone().view(torch.int64), start)
    return f"{total % 2**64:016x}"


def _mixed(words: torch.Tensor, first: int) -> int:
    mixed = words * -7046029254386353131  # an odd number: 2**64 over the golden ratio
    mixed ^= mixed >> 32
    places = torch.arange(first, first + words.numel(), device=words.device)
    return int((mixed * (2 * places + 1)).sum())
