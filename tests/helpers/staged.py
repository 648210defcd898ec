"""An engine as vLLM is one on a CPU, small: layers whose weights it packs after loading, so that they are staged for new ones."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch

from checkpoint_engine.loads.recordable import Recordable
from checkpoint_engine.loads.staging import Listener
from checkpoint_engine.worker.vllm_stage import Held, StagedLayer

ROWS, COLUMNS, LAYERS = 8, 16, 3
Weights = list[tuple[str, torch.Tensor]]


class Method:
    """Packs: transposed, doubled, one row of padding less."""

    fails = False

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.fails:
            raise ValueError("no kernel today")
        layer.weight = torch.nn.Parameter((layer.weight[: 2 * ROWS] * 2).t().contiguous(), requires_grad=False)


class Packed(torch.nn.Module):
    """Two shards of ROWS rows and, in the checkpoint's layout, one row of padding, that nothing is loaded into.

    kind  how it loads: "copies"; "casts"; "hides" (no operation shows its second shard); "numpy"; "replaces";
          "pads" (writes zeroes, too)
    """

    output_sizes = (ROWS, ROWS)

    def __init__(self, kind: str, device: str) -> None:
        super().__init__()
        self.kind, self.quant_method, self.calls = kind, Method(), 0
        self.weight = torch.nn.Parameter(torch.zeros(COLUMNS, 2 * ROWS, device=device), requires_grad=False)
        self.dtype, self.device = torch.float32, device

    def load(self, param: torch.Tensor, loaded_weight: torch.Tensor, loaded_shard_id: int) -> None:
        self.calls += 1
        part = param.data.narrow(0, ROWS * loaded_shard_id, ROWS)
        if self.kind == "casts":
            part.copy_(loaded_weight.double())
        elif self.kind == "hides" and loaded_shard_id:
            ctypes.memmove(part.data_ptr(), loaded_weight.data_ptr(), loaded_weight.nbytes)
        elif self.kind == "numpy":
            part.numpy()[:] = loaded_weight.numpy()
        elif self.kind == "replaces":
            param.data = torch.cat(
                [loaded_weight, param.data[ROWS:]] if not loaded_shard_id else [param.data[:ROWS], loaded_weight]
            )
        else:
            part.copy_(loaded_weight)
            if self.kind == "pads":
                param.data[2 * ROWS :].fill_(0)


class Internals:
    """What `vllm_stage.Internals` finds in vLLM."""

    unloadable: frozenset[str] = frozenset()
    configured: frozenset[str] = frozenset()

    def info(self, layer: Packed) -> Any:
        return SimpleNamespace(restore_metadata=({"weight": None},))

    def to_meta(self, layer: Packed, info: Any) -> None:
        meta: Any = torch.nn.Parameter(torch.empty(2 * ROWS + 1, COLUMNS, device="meta", dtype=layer.dtype), requires_grad=False)
        meta.weight_loader = layer.load
        del layer.weight
        layer.register_parameter("weight", meta)

    def materialize(self, layer: Packed, info: Any) -> None:
        blank = torch.full(layer.weight.shape, 3.0, dtype=layer.dtype, device=layer.device)
        fresh: Any = torch.nn.Parameter(blank, requires_grad=False)
        vars(fresh).update(vars(layer.weight))
        layer.weight = fresh

    def count(self, original: Any, bound: Any) -> tuple[int, Any]:
        return bound.arguments["loaded_weight"].numel(), original(*bound.args, **bound.kwargs)

    def numel(self, layer: Packed) -> int:
        return (2 * ROWS + 1) * COLUMNS  # padding never adds up

    def original_loader(self, tensor: Any) -> Any:
        return tensor.weight_loader


class Engine(torch.nn.Module):
    """LAYERS packed layers, and a table that is loaded as it is. Its stages are those of `Recordable`."""

    def __init__(self, kinds: Iterable[str] = ("copies",) * LAYERS, device: str = "cpu") -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Packed(kind, device) for kind in kinds)
        self.table = torch.nn.Parameter(torch.zeros(ROWS, COLUMNS, device=device), requires_grad=False)
        self.held = Held()
        self._staged: dict[str, StagedLayer] | None = None
        self._listener: Listener | None = None

    @property
    def recordable(self) -> Recordable:
        return Recordable(self, begins=self.abandon, replaying=lambda names: self._begin(), stages=self)

    def _begin(self) -> dict[str, StagedLayer]:
        if self._staged is None:
            internals: Any = Internals()
            names = {f"layers.{n}": layer for n, layer in enumerate(self.layers)}
            self._staged = {n: StagedLayer(n, m, internals, None, self.held, self._listener) for n, m in names.items()}
            for layer in self._staged.values():
                layer.prepare()
        return self._staged

    def load(self, weights: Weights) -> None:
        self._begin()
        for name, tensor in weights:
            kind, *where = name.split(".")
            if kind == "table":
                self.table.data.copy_(tensor)
            else:
                param: Any = self.layers[int(where[0])].weight
                param.weight_loader(param, tensor, int(where[1]))

    def post_hook(self) -> None:
        self.settle()
        self._staged = None

    def listen(self, listener: Listener | None, written: frozenset[str]) -> None:
        self._listener, self.written = listener, written

    def open(self, layer: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return self._begin()[layer].open(names)

    def finish_layer(self, layer: str) -> None:
        self._begin()[layer].finish()

    def settle(self) -> None:
        for layer in self._begin().values():
            if not layer.done:
                layer.finish()

    def abandon(self) -> None:
        for layer in (self._staged or {}).values():
            layer.put_back()
        self._staged = None

    @property
    def replaced(self) -> frozenset[str]:
        return frozenset(f"{name}.{own}" for name, layer in self._begin().items() for own in layer.replaced)

    @property
    def calls(self) -> list[int]:
        return [int(layer.calls) for layer in self.layers]


def checkpoint(seed: int) -> Weights:
    chance = torch.Generator().manual_seed(seed)
    names = ["table", *(f"layer.{n}.{shard}" for n in range(LAYERS) for shard in range(2))]
    return [(name, torch.rand(ROWS, COLUMNS, generator=chance)) for name in names]


def serves(engine: Engine, seed: int) -> bool:
    """Whether it serves exactly this checkpoint."""
    (_, table), *parts = checkpoint(seed)
    packed = [torch.cat([parts[2 * n][1], parts[2 * n + 1][1]]).mul(2).t() for n in range(LAYERS)]
    same = [torch.equal(layer.weight.cpu(), part) for layer, part in zip(engine.layers, packed, strict=True)]
    return torch.equal(engine.table.cpu(), table) and all(same)
