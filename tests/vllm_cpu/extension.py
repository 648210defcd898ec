"""The worker extension, and what a test needs inside the worker: a loader that fails on one rank, a look at the model."""

from __future__ import annotations

from typing import Any

from checkpoint_engine.worker import VllmColocateWorkerExtension


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

    def testing_layout(self) -> dict[str, Any]:
        """Of every tensor of the model: shape, dtype, device, and where it lies."""
        model = self.model_runner.get_model()
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {n: [list(t.shape), str(t.dtype), str(t.device), t.data_ptr()] for n, t in tensors.items()}
