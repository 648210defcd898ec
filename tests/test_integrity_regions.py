"""Digests of registered regions by a device: the same, whatever the tensors came from, and by the CPU where it can make none."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
import types
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_engine.devices import digests
from checkpoint_engine.devices.base import get_device
from checkpoint_engine.devices.region_sums import DeviceSums
from checkpoint_engine.manifest import RegionMeta
from checkpoint_engine.memory import digest
from checkpoint_engine.memory.checksum import partial_sum
from checkpoint_engine.memory.digest import content_digest
from checkpoint_engine.memory.registry import Registry
from checkpoint_engine.memory.work import CHUNK_BYTES
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.settings import Settings


class OneByOne:
    """Stands for a device, with what the sums are defined by. able: whether it can make any."""

    def __init__(self, *, able: bool) -> None:
        self.able, self.prepared, self.regions = able, 0, 0

    def prepare(self) -> bool:
        self.prepared += 1
        return True

    def __call__(self, memory: torch.Tensor, runs: Sequence[tuple[int, int]]) -> list[int] | None:
        self.regions += 1
        assert all(at % 8 == 0 for at, _ in runs)
        return [int(partial_sum(memory[at : at + nbytes])) for at, nbytes in runs] if self.able else None


@pytest.fixture
def files(tmp_path: Path, shm_dir: Path) -> list[Path]:
    """One that is read, and one in /dev/shm, whose tensors begin at odd places."""
    save_file({"read": torch.randn(CHUNK_BYTES // 4 + 9), "flat": torch.ones(3, 5)}, tmp_path / "f")
    header = json.dumps({name: {"dtype": "U8", "shape": [n], "data_offsets": [at, at + n]} for name, n, at in PLACED}).encode()
    header += b" " * (3 - len(header) % 4)  # not a multiple of 4: nothing is aligned
    mapped = shm_dir / "f"
    mapped.write_bytes(struct.pack("<Q", len(header)) + header + os.urandom(5000 + 70_001))
    return [tmp_path / "f", mapped]


PLACED = [("mapped", 5000, 0), ("behind", 70_001, 5000)]


def tensors() -> dict[str, torch.Tensor]:
    return {"large": torch.randn(5 * CHUNK_BYTES // 16), "strided": torch.randn(40, 30).t(), "none": torch.zeros(0)}


def check(registry: Registry, name: str) -> None:
    checkpoint = registry[name]
    metas: tuple[RegionMeta, ...] = checkpoint.metas()
    assert sum(len(meta.tensors) for meta in metas) >= 3
    for region, meta in zip(checkpoint.regions, metas, strict=True):
        for t in meta.tensors:
            assert t.digest == content_digest(bytes(region.view(t.offset, t.nbytes))), t.name


def _tell(told: list[tuple[int, int]], done: int, total: int) -> None:
    told.append((done, total))


@pytest.mark.parametrize("able", [True, False])
def test_of_all_kinds_of_regions(able: bool, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "DEVICE_BYTES", 1000)
    sums = OneByOne(able=able)
    with Registry(Settings(io_threads=3), sums=sums) as registry:
        for name in ("first", "again"):
            told: list[tuple[int, int]] = []
            options: Any = {"files": files, "use_shared_memory_pool": True, "progress": partial(_tell, told)}
            registry.register(name, named_tensors=tensors(), **options)
            check(registry, name)
            assert [done for done, _ in told] == sorted({done for done, _ in told})
            assert told[-1][0] == told[-1][1] >= registry[name].nbytes
            registry.unregister(name)
        assert (sums.prepared, sums.regions) == (6, 6)
        registry.register("off", named_tensors=tensors(), digests=False)
        assert not any(t.digest for meta in registry["off"].metas() for t in meta.tensors)
        assert sums.regions == 6


def test_small_regions_need_no_device() -> None:
    sums = OneByOne(able=True)
    with Registry(Settings(io_threads=1), sums=sums) as registry:
        registry.register("c", named_tensors=tensors())
        check(registry, "c")
    assert (sums.prepared, sums.regions) == (0, 0)
    assert get_device("cpu").region_sums() is None


def test_a_device_that_is_known_to_be_unable_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "DEVICE_BYTES", 1000)
    sums = OneByOne(able=False)
    sums.prepare = lambda: False  # type: ignore[method-assign]
    with Registry(Settings(io_threads=1), sums=sums) as registry:
        registry.register("c", named_tensors=tensors())
        check(registry, "c")
    assert sums.regions == 0


def test_a_kernel_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As where there is Triton, and no C compiler: digests are made without it, and it is tried once."""

    def compile_for(device: torch.device) -> None:
        tried.append(device)
        raise RuntimeError("Failed to find C compiler")

    tried: list[torch.device] = []
    module: Any = types.ModuleType("checkpoint_engine.devices.digest_kernel")
    module.compile_for = compile_for
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(digests, "has_kernel", lambda: True)
    monkeypatch.setattr(digest, "DEVICE_BYTES", 1000)
    there = torch.device("cuda", 7)
    sums = DeviceSums(get_device("cpu"), there)
    with Registry(Settings(io_threads=2), sums=sums) as registry:
        for name in ("first", "again"):
            registry.register(name, named_tensors=tensors())
            check(registry, name)
    assert not sums.prepare()
    assert tried == [there]
    assert "C compiler" in caplog.text
    digests.kernel_works.cache_clear()


@pytest.mark.gpu
def test_by_a_gpu(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "DEVICE_BYTES", 1000)
    made = []
    original = DeviceSums._sum

    def counted(self: DeviceSums, *args: Any) -> list[int]:
        made.append(original(self, *args))
        return made[-1]

    monkeypatch.setattr(DeviceSums, "_sum", counted)
    named = tensors() | {"there": torch.randn(3000, device="cuda"), "huge": torch.randn(200 << 20)}
    with contextlib.closing(ParameterServer(rank=0, world_size=1)) as ps:
        for name in ("first", "again"):
            ps.register_checkpoint(name, files=files, named_tensors=named, use_shared_memory_pool=name == "again")
            check(ps._registry, name)
        assert len(made) == 6  # of three regions each
        assert torch.cuda.current_device() == 0
