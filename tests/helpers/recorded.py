"""Worker processes whose engine names its model: one tensor-parallel rank of a small model, and loaders of many kinds."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from checkpoint_engine.devices.base import Mapping, SharedHandle
from checkpoint_engine.devices.cpu import CpuDevice
from checkpoint_engine.devices.host_regions import HostRegions
from checkpoint_engine.loads.recordable import Recordable
from checkpoint_engine.loads.replay import Prepared
from checkpoint_engine.manifest import hex_digest
from checkpoint_engine.settings import Settings
from checkpoint_engine.worker import WeightsState, update_weights_from_ipc
from helpers.fleet import Worker, worker_processes

Weights = list[tuple[str, torch.Tensor]]
EXPERTS, HIDDEN, LAYERS = 6, 32, 4
APART, UNUSED = 12, 6
"""Of the kind "apart": experts, of which each rank keeps a run, and tensors of each layer that no rank keeps anything of."""


@dataclasses.dataclass(frozen=True)
class Deed:
    """What a worker does in one update, and when: before the nth bucket that is replayed, or loaded; or in the post-hook.

    what   "die", "raise", "break" (a replay breaks off once); or before the update begins: "move" (parameters), "permute"
           (experts), "exchange" (keep the next rank's experts); "twice": take two passes
    """

    what: str = ""
    where: str = ""
    number: int = 0


class Layer(torch.nn.Module):
    expert_map: torch.Tensor

    def __init__(self, world_size: int, device: torch.device, experts: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        half = HIDDEN // world_size
        self.qkv = torch.nn.Parameter(torch.zeros(3 * half, HIDDEN, **options), requires_grad=False)
        self.down = torch.nn.Parameter(torch.zeros(HIDDEN, half, **options), requires_grad=False)
        self.experts = torch.nn.Parameter(torch.zeros(experts // world_size, half, HIDDEN, **options), requires_grad=False)
        self.norm = torch.nn.Parameter(torch.zeros(HIDDEN, **options), requires_grad=False)
        self.register_buffer("expert_map", torch.full((experts,), -1, device=device))


class Net(torch.nn.Module):
    def __init__(self, rank: int, world_size: int, device: torch.device, kind: str = "") -> None:
        super().__init__()
        self.apart = kind == "apart"
        experts = APART if self.apart else EXPERTS
        self.layers = torch.nn.ModuleList(Layer(world_size, device, experts) for _ in range(LAYERS))
        self.keep_experts_of(rank, world_size)

    def keep_experts_of(self, rank: int, world_size: int) -> None:
        for layer in self.layers:
            there: Any = layer.expert_map
            count = len(there) // world_size
            mine = range(rank * count, (rank + 1) * count) if self.apart else range(rank, len(there), world_size)
            there.fill_(-1)
            there[list(mine)] = torch.arange(len(mine), device=there.device, dtype=there.dtype)


class Loader:
    """kind: what is peculiar in how it loads norms (or, "keeps" and "drops a row", the parts of qkv)."""

    def __init__(self, net: Net, rank: int, world_size: int, kind: str) -> None:
        self.net, self.rank, self.world_size, self.kind = net, rank, world_size, kind
        self.names: list[str] = []
        self._kept: dict[int, torch.Tensor] = {}

    def load(self, weights: Weights) -> None:
        with torch.no_grad():
            for name, tensor in weights:
                self.names.append(name)
                _, number, kind, *rest = name.split(".")
                self._one(int(number), kind, rest, tensor)

    def _one(self, number: int, kind: str, rest: list[str], tensor: torch.Tensor) -> None:
        layer: Any = self.net.layers[number]
        half = HIDDEN // self.world_size
        mine = slice(self.rank * half, (self.rank + 1) * half)
        if kind in "qkv":
            place = "qkv".index(kind) * half
            if self.kind == "drops a row" and kind == "v":
                mine, half = slice(mine.start, mine.stop - 1), half - 1
            if self.kind == "keeps" and kind in "qk":  # until the other one comes
                if (other := self._kept.pop(number, None)) is None:
                    self._kept[number] = tensor[mine].clone()
                else:
                    parts = [other, tensor[mine]] if kind == "k" else [tensor[mine], other]
                    layer.qkv[: 2 * half].copy_(torch.cat(parts))
            else:
                layer.qkv[place : place + half].copy_(tensor[mine])
        elif kind == "down":
            layer.down.copy_(tensor[:, mine])
        elif kind == "experts":
            local = int(layer.expert_map[int(rest[0])])
            if local >= 0:
                layer.experts[local].copy_(tensor[mine])
        elif kind == "norm":
            self._norm(number, layer.norm, tensor)

    def _norm(self, number: int, norm: torch.Tensor, tensor: torch.Tensor) -> None:
        match self.kind:
            case "casts":
                norm.copy_(tensor.float() + 1)
            case "transposes into another dtype":
                norm.view(4, 8).copy_(tensor.view(8, 4).t().float())
            case "writes twice":
                norm.copy_(tensor)
                norm[:4].copy_(tensor[4:8])
            case "writes behind":  # after the copy, and past every operation
                norm.copy_(tensor)
                norm.view(torch.int16).numpy()[:] += 1
            case "replaces":
                layer: Any = self.net.layers[number]
                layer.norm = torch.nn.Parameter(tensor.clone(), requires_grad=False)
            case _:
                norm.copy_(tensor)


class _Nothing(Loader):
    def _one(self, *_: Any) -> None:
        pass


def make_loader(net: Net, rank: int, world_size: int, kind: str) -> Loader:
    return (_Nothing if kind == "writes nothing" else Loader)(net, rank, world_size, kind)


def checkpoint(seed: int, kind: str = "") -> dict[str, torch.Tensor]:
    """All of a model that ranks have shards of."""
    experts, unused = (APART, UNUSED) if kind == "apart" else (EXPERTS, 0)
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer in range(LAYERS):
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("q", "k", "v", "down"), (HIDDEN, HIDDEN))
        shapes |= {f"experts.{e}": (HIDDEN, HIDDEN) for e in range(experts)} | {"norm": (HIDDEN,)}
        shapes |= {f"unused.{i}": (HIDDEN, HIDDEN) for i in range(unused)}
        for name, shape in shapes.items():
            made[f"layers.{layer}.{name}"] = torch.randn(shape, generator=generator).to(torch.bfloat16)
    return made


def state_of(net: Net) -> dict[str, str]:
    return {n: hex_digest(p.detach().cpu().view(torch.uint8).numpy().tobytes()) for n, p in net.named_parameters()}


def fresh(
    weights: dict[str, torch.Tensor],
    rank: int,
    world_size: int,
    kind: str = "",
    permuted: bool = False,
    experts_of: int | None = None,
) -> dict[str, str]:
    """Digests of the parameters after a load of `weights` into a new model. experts_of: the rank whose experts it keeps."""
    net = Net(rank, world_size, torch.device("cpu"), kind)
    net.keep_experts_of(rank if experts_of is None else experts_of, world_size)
    if permuted:
        _permute(net)
    make_loader(net, rank, world_size, kind).load(list(weights.items()))
    return state_of(net)


def _permute(net: Net) -> None:
    for layer in net.layers:
        there: Any = layer.expert_map
        count = int((there >= 0).sum())
        there.copy_(torch.where(there >= 0, count - 1 - there, there))


class _Engine:
    def __init__(self, index: int, rank: int, world_size: int, kind: str) -> None:
        cuda = Settings.from_environment().device != "cpu" and torch.cuda.is_available()
        self.index = index
        self.net = Net(rank, world_size, torch.device("cuda", index) if cuda else torch.device("cpu"), kind)
        self._next = (rank + 1) % world_size, world_size
        self.loader = make_loader(self.net, rank, world_size, kind)
        self.state = WeightsState()
        self.deed, self.count, self.replayed = Deed(), 0, 0

    def _do(self, where: str) -> None:
        self.count += where == self.deed.where
        if self.deed.where == where and self.count > self.deed.number:
            if self.deed.what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError(f"ordered to fail in {where}")

    def run(self, weights: Weights) -> None:
        self._do("load")
        self.loader.load(weights)

    def replaying(self, names: Sequence[str]) -> None:
        self._do("replay")
        self.replayed += len(names)

    def update(self, handle: str, deed: Deed) -> str:
        self.deed, self.count, self.replayed = deed, 0, 0
        self.loader.names.clear()
        if deed.what == "permute":
            _permute(self.net)
        if deed.what == "exchange":
            self.net.keep_experts_of(*self._next)
        if deed.what == "break":
            _break_a_replay(deed.number)
        if deed.what == "move":
            for parameter in self.net.parameters():
                parameter.data = parameter.data.clone()
        model = Recordable(self.net, replaying=self.replaying)
        post_hook: Callable[[], None] = lambda: self._do("post_hook")  # noqa: E731
        options: dict[str, Any] = {"run": self.run, "post_hook": post_hook, "state": self.state, "model": model}
        if deed.what == "twice":
            update_weights_from_ipc(None, handle, self.index, **options)
        return update_weights_from_ipc(None, handle, self.index, **options)


def _break_a_replay(number: int) -> None:
    """Have one bucket's replay fail halfway, in this process."""
    replay, calls = Prepared.replay, itertools.count()

    def breaking(prepared: Prepared, memories: Sequence[torch.Tensor]) -> None:
        if next(calls) == number:
            Prepared.replay = replay  # type: ignore[method-assign]
            raise RuntimeError("ordered to break off")
        replay(prepared, memories)

    Prepared.replay = breaking  # type: ignore[method-assign]


def _keep_regions() -> None:
    """Have this process treat regions as a GPU's does: mapped ahead, registered, and kept from update to update."""
    kept = HostRegions(CpuDevice().register_host, CpuDevice().synchronize)
    open_ring = CpuDevice.open_ring

    def open_region(device: CpuDevice, handle: SharedHandle, descriptors: tuple[int, ...]) -> Mapping:
        if handle.kind == "region":
            return kept.open(handle, descriptors[0])
        return open_ring(device, handle, descriptors)

    CpuDevice.open_ring = open_region  # type: ignore[method-assign]
    CpuDevice.map_ahead = lambda _, regions, fds: kept.prepare(regions, fds)  # type: ignore[method-assign]


def _engine(pipe: Connection, variables: dict[str, str], index: int, rank: int, world_size: int, kind: str) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    engine = _Engine(index, rank, world_size, kind)
    while True:
        command, *args = pipe.recv()
        try:
            answer: Any = engine.update(*args) if command == "update" else None
            if command == "keep regions":
                _keep_regions()
            if command == "state":
                answer = (*engine.state.read(), state_of(engine.net), sorted(set(engine.loader.names)), engine.replayed)
            pipe.send((True, answer))
        except Exception as e:
            pipe.send((False, f"{type(e).__name__}: {e}"))


def engines(kinds: Sequence[str], devices: int | None = None) -> contextlib.AbstractContextManager[list[Worker]]:
    """One worker process for each kind of loader, of the ranks of one tensor-parallel model; killed at the end."""
    places = enumerate(kinds)
    return worker_processes(_engine, [(rank % (devices or len(kinds)), rank, len(kinds), kind) for rank, kind in places])
