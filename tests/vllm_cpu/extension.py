"""The worker extension, and what a test needs inside the worker: a loader that fails on one rank, a look at the models."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from checkpoint_engine.worker import VllmColocateWorkerExtension

# On CPUs with AMX vLLM 0.32 uses its tiles in attention. A process has to ask the system for them first, which only some of its
# other kernels do: without those the worker dies of SIGILL at the first request.
if torch.cpu._is_amx_tile_supported():
    torch.cpu._init_amx()


class Extension(VllmColocateWorkerExtension):
    def testing_fail(self, rank: int, call: int) -> dict[str, Any]:
        """From now on, until called with call < 0, the `call`-th load_weights of a rank raises when it has loaded its tensors."""
        model = self.model_runner.get_model()
        vars(model).pop("load_weights", None)
        load, calls = model.load_weights, 0

        def failing(weights: Any) -> Any:
            nonlocal calls
            result = load(weights)
            calls += 1
            if calls == call:
                raise ValueError("out of order")
            return result

        if call >= 0 and self.rank == rank:
            vars(model)["load_weights"] = failing
        return {}

    def testing_fail_staged(self, rank: int, count: int) -> dict[str, Any]:
        """On that rank the `count`-th staged layer from now on fails to be post-processed, once."""
        from checkpoint_engine.worker.vllm_stage import StagedLayer

        real, left = StagedLayer._finish, count

        def failing(layer: StagedLayer) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                StagedLayer._finish = real  # type: ignore[method-assign]
                raise ValueError("out of order")
            real(layer)

        if self.rank == rank:
            StagedLayer._finish = failing  # type: ignore[method-assign]
        return {}

    def testing_layout(self) -> dict[str, Any]:
        """Of every tensor of the model: shape, dtype, device, and where it lies."""
        model = self.model_runner.get_model()
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {n: [list(t.shape), str(t.dtype), str(t.device), t.data_ptr()] for n, t in tensors.items()}

    def testing_digest(self, draft: bool) -> dict[str, str]:
        """Of every tensor of the model, or of its draft, its digest; of a projection, whose weight a CPU packs away, one of what
        it makes of a fixed input."""
        model = self.model_runner.get_draft_model() if draft else self.model_runner.get_model()
        told = {}
        for name, module in model.named_modules():
            for own, tensor in module.named_parameters(recurse=False):
                told[f"{name}.{own}"] = _digest(tensor)
            if hasattr(module, "input_size_per_partition") and hasattr(module, "quant_method"):
                x = torch.arange(module.input_size_per_partition).remainder(7).sub(3).to(torch.bfloat16).unsqueeze(0)
                told[f"{name}()"] = _digest(module.quant_method.apply(module, x, None))
        return told


def _digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
