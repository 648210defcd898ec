from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_engine.errors import (
    CheckpointBusyError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    FileFormatError,
)
from checkpoint_engine.manifest import RegionMeta, TensorMeta
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.memory.registry import Registry
from checkpoint_engine.settings import Settings


class Device:
    """What a device does with regions, written down."""

    def __init__(self) -> None:
        self.live: set[int] = set()
        self.registrations = 0

    def create(self, region: HostRegion) -> None:
        assert region.generation not in self.live
        self.live.add(region.generation)
        self.registrations += 1

    def destroy(self, region: HostRegion) -> None:
        assert not region.closed
        self.live.remove(region.generation)


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def registry(device: Device) -> Iterator[Registry]:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with Registry(Settings(io_threads=2), device.create, device.destroy) as registry:
        yield registry
    assert device.live == set()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def value(registry: Registry, name: str) -> list[float]:
    (region,) = registry[name].regions
    (meta,) = registry[name].metas()
    t = meta.tensors[0]
    return region.tensor[t.offset : t.offset + t.nbytes].clone().view(torch.float32).tolist()


def test_names(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="'a'"):
        registry["a"]
    with pytest.raises(CheckpointNotFoundError):
        registry.unregister("a")
    registry.register("a", named_tensors={"w": torch.ones(2)})
    with pytest.raises(CheckpointExistsError):
        registry.register("a", named_tensors={"w": torch.zeros(2)})
    assert value(registry, "a") == [1, 1]
    (tmp_path / "bad").touch()
    with pytest.raises(FileFormatError):
        registry.register("b", files=[str(tmp_path / "bad")])
    assert registry.names() == ("a",)
    assert "a" in registry
    assert "b" not in registry
    assert 3 not in registry
    save_file({"w": torch.full((2,), 2.0)}, tmp_path / "good")
    registry.register("b", files=[str(tmp_path / "good")])
    assert value(registry, "b") == [2, 2]
    assert registry.names() == ("a", "b")
    registry.unregister("a")
    assert registry.names() == ("b",)


def test_steps_do_not_register_memory_again(registry: Registry, device: Device, tmp_path: Path) -> None:
    save_file({"f": torch.ones(1000)}, tmp_path / "f")
    arguments = {"files": [tmp_path / "f"], "use_shared_memory_pool": True}
    registry.register("step-0", named_tensors={"w": torch.zeros(9)}, **arguments)
    regions = registry["step-0"].regions
    for step in range(1, 4):
        registry.unregister(f"step-{step - 1}")
        registry.register(f"step-{step}", named_tensors={"w": torch.full((9,), float(step))}, **arguments)
        assert set(registry[f"step-{step}"].regions) == set(regions)
        assert device.registrations == 2
    registry.register("step-4", named_tensors={"w": torch.full((9,), 4.0)}, **arguments)  # next to the live one
    assert device.registrations == 4
    registry.unregister("step-3")
    registry.register("step-5", named_tensors={"w": torch.full((9,), 5.0)}, **arguments)
    assert device.registrations == 4
    registry.register("other", named_tensors={"w": torch.ones(3)})
    registry.unregister("other")
    assert len(device.live) == 4
    registry.unregister("step-4")
    assert len(device.live) == 4
    registry.unregister("step-5", force=True)
    assert device.live == set()


def test_shared_pool_of_another_shape(registry: Registry, device: Device) -> None:
    registry.register("a", named_tensors={"w": torch.ones(3)}, use_shared_memory_pool=True)
    registry.unregister("a")
    assert len(device.live) == 1
    registry.register("b", named_tensors={"w": torch.ones(4)}, use_shared_memory_pool=True)
    assert value(registry, "b") == [1, 1, 1, 1]
    assert len(device.live) == 1


def test_in_use(registry: Registry) -> None:
    registry.register("a", named_tensors={"w": torch.ones(2)})
    with registry.use("a") as checkpoint, registry.use("a"):
        assert checkpoint is registry["a"]
        with pytest.raises(CheckpointBusyError, match="'a'"):
            registry.unregister("a", force=True)
    registry.unregister("a")
    with pytest.raises(CheckpointNotFoundError), registry.use("a"):
        pass


def test_while_it_is_being_registered(registry: Registry) -> None:
    seen: list[type[BaseException]] = []

    def progress(done: int, total: int) -> None:
        for attempt in (
            lambda: registry.register("a", named_tensors={}),
            lambda: registry.unregister("a"),
            lambda: registry["a"],
        ):
            with pytest.raises(CheckpointError) as caught:
                attempt()
            seen.append(caught.type)
        assert registry.names() == ()

    registry.register("a", named_tensors={"w": torch.ones(2)}, progress=progress)
    assert seen == [CheckpointExistsError, CheckpointBusyError, CheckpointNotFoundError]
    assert registry.names() == ("a",)


def test_closing(device: Device) -> None:
    registry = Registry(Settings(io_threads=1), device.create, device.destroy)
    registry.register("a", named_tensors={"w": torch.ones(2)})
    registry.register("b", named_tensors={"w": torch.ones(3)}, use_shared_memory_pool=True)
    with registry.use("a") as checkpoint:
        registry.close()
        assert len(device.live) == 1
        assert checkpoint.regions[0].tensor.numel() == 8
    assert device.live == set()
    registry.close()
    with pytest.raises(CheckpointError, match="closed"):
        registry.register("c")
    assert registry.names() == ()


def test_closing_during_a_registration(device: Device) -> None:
    registry = Registry(Settings(io_threads=1), device.create, device.destroy)
    with pytest.raises(CheckpointError, match="closed"):
        registry.register("a", named_tensors={"w": torch.ones(2)}, progress=lambda done, total: registry.close())
    assert device.live == set()


def test_many_threads(registry: Registry) -> None:
    outcomes: list[str] = []
    start = threading.Barrier(6, timeout=30)

    def work(number: int) -> None:
        start.wait()
        for step in range(5):
            registry.register(
                f"{number}-{step}", named_tensors={"w": torch.full((5,), number * 1.0)}, use_shared_memory_pool=True
            )
            assert value(registry, f"{number}-{step}") == [number] * 5
            registry.unregister(f"{number}-{step}")
        try:
            registry.register("same", named_tensors={"w": torch.ones(1)})
            outcomes.append("mine")
        except CheckpointExistsError:
            outcomes.append("taken")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == ["mine"] + ["taken"] * 5


def test_memory_for_what_comes_from_elsewhere(registry: Registry, device: Device) -> None:
    """It is registered if it came, given back if it did not; the name is taken meanwhile."""
    metas = (RegionMeta(4096, (TensorMeta("a", "uint8", (3,), 0, 7),)),)
    with registry.receive("a", [4096]) as received:
        assert device.live == {region.generation for region in received.regions}
        assert "a" not in registry and registry.names() == ()
        with pytest.raises(CheckpointExistsError):
            registry.register("a", named_tensors={"a": torch.zeros(3)})
        received.metas = metas
    assert registry["a"].metas() == metas
    with pytest.raises(CheckpointExistsError), registry.receive("a", [4096]):
        pass
    registry.unregister("a")
    with registry.receive("a", [4096, 8192]):
        assert len(device.live) == 2
    with contextlib.suppress(ValueError), registry.receive("a", [4096]) as received:
        received.metas = metas
        raise ValueError("it broke")
    with pytest.raises(CheckpointError), registry.receive("a", [1 << 60]):
        pass
    assert device.live == set() and registry.names() == () and registry.kept_bytes == 0


def test_what_comes_after_the_registry_was_closed_is_given_back(device: Device) -> None:
    registry = Registry(Settings(io_threads=2), device.create, device.destroy)
    with registry.receive("a", [4096]) as received:
        registry.close()
        received.metas = (RegionMeta(4096, ()),)
    assert device.live == set() and registry.names() == ()
