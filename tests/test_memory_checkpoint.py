from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoint_engine.errors import CheckpointError, DuplicateTensorError, FileFormatError, TensorError
from checkpoint_engine.manifest import ITEMSIZE
from checkpoint_engine.memory.checkpoint import HostCheckpoint, build
from checkpoint_engine.memory.digest import content_digest
from checkpoint_engine.memory.pool import RegionPool
from checkpoint_engine.memory.work import CHUNK_BYTES


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def check(checkpoint: HostCheckpoint, expected: Mapping[str, torch.Tensor], digests: bool = True) -> None:
    """The checkpoint holds exactly these tensors, bit for bit."""
    names = []
    for region, meta in zip(checkpoint.regions, checkpoint.metas(), strict=True):
        assert region.nbytes == meta.nbytes
        end = 0
        for t in meta.tensors:
            assert t.offset >= end
            end = t.offset + t.nbytes
            want = expected[t.name]
            assert (t.dtype, t.shape) == (str(want.dtype).removeprefix("torch."), tuple(want.shape))
            assert bytes(region.view(t.offset, t.nbytes)) == raw(want)
            assert t.digest == (content_digest(raw(want)) if digests else 0)
            names.append(t.name)
        assert end <= meta.nbytes
    assert sorted(names) == sorted(expected)
    assert checkpoint.nbytes == sum(t.numel() * t.element_size() for t in expected.values())


HERE = sorted(name for name in ITEMSIZE if hasattr(torch, name))  # torch 2.6 has no float8_e8m0fnu


def fill(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype == "bool":
        return torch.randint(0, 2, shape).bool()
    size = ITEMSIZE[dtype]
    count = torch.Size(shape).numel()
    return torch.randint(0, 256, (count * size,), dtype=torch.uint8).view(getattr(torch, dtype)).reshape(shape)


@pytest.fixture
def pool() -> Iterator[RegionPool]:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with RegionPool() as pool:
        yield pool
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


shape = st.lists(st.integers(0, 6), max_size=3).map(tuple)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("trip")
    everything: dict[str, torch.Tensor] = {}
    files = []
    in_file: set[str] = set()
    for i in range(data.draw(st.integers(0, 3))):
        spec = data.draw(st.lists(st.tuples(st.sampled_from(sorted({*HERE} - {"complex128"})), shape), min_size=1, max_size=5))
        tensors = {f"layers.{i}.{j}.w": fill(*s) for j, s in enumerate(spec) if s[0] != "float8_e8m0fnu"}
        if tensors:
            files.append(folder / f"{i}.safetensors")
            save_file(tensors, files[-1])
            everything |= tensors
            in_file |= set(tensors)
    spec = data.draw(st.lists(st.tuples(st.sampled_from(HERE), shape), max_size=5))
    named = {f"named.{j}": fill(*s) for j, s in enumerate(spec)}
    select = data.draw(st.one_of(st.none(), st.sets(st.sampled_from(sorted(in_file))) if in_file else st.just(set[str]())))
    seen: list[tuple[int, int]] = []
    with RegionPool() as pool, build(
        "c", files=files, named_tensors=named, select=select, pool=pool, threads=2, progress=lambda *args: seen.append(args)
    ) as checkpoint:  # fmt: skip
        wanted = {k: v for k, v in everything.items() if select is None or k in select}
        check(checkpoint, wanted | named)
        if seen:
            assert seen[-1][0] == seen[-1][1]
            assert seen == sorted(seen)


def test_large_tensors_and_digest_switch(tmp_path: Path, pool: RegionPool) -> None:
    tensors = {"a": fill("bfloat16", (CHUNK_BYTES + 3, 1)), "b": fill("int8", (5,)), "c": fill("float32", (CHUNK_BYTES // 4,))}
    save_file(tensors, tmp_path / "f")
    named = {"big": fill("uint8", (2 * CHUNK_BYTES + 1,)), "strided": fill("float32", (3000, 1000)).t()}
    for digests in (True, False):
        with build("c", files=[tmp_path / "f"], named_tensors=named, pool=pool, threads=3, digests=digests) as checkpoint:
            check(checkpoint, tensors | named, digests)
    with build("c", files=[tmp_path / "f"], select={"a", "c"}, pool=pool, threads=3) as checkpoint:
        check(checkpoint, {k: tensors[k] for k in "ac"})
        assert sum(r.nbytes for r in checkpoint.regions) < 4 * CHUNK_BYTES


def test_tensors_of_every_kind(pool: RegionPool) -> None:
    named: dict[str, torch.Tensor] = {}
    for dtype in HERE:
        base = fill(dtype, (4, 6, 5))
        named |= {f"{dtype}.whole": base, f"{dtype}.t": base.transpose(0, 2), f"{dtype}.part": base[1:3, ::2],
                  f"{dtype}.expanded": base[:1].expand(3, 6, 5), f"{dtype}.scalar": base[0, 0, 0], f"{dtype}.empty": base[:0],
                  f"{dtype}.offset": base.view(-1)[7:]}  # fmt: skip
    named["conj"] = torch.randn(3, dtype=torch.complex64).conj()
    named["neg"] = torch.randn(3, dtype=torch.complex128).conj().imag
    named["parameter"] = torch.nn.Parameter(torch.randn(3))
    named["grad"] = torch.randn(3, requires_grad=True) * 2
    with build("c", named_tensors=named, pool=pool, threads=2) as checkpoint:
        check(checkpoint, named)
        assert len(checkpoint.regions) == 1
        assert all(t.offset % 256 == 0 for t in checkpoint.metas()[0].tensors)


def test_named_tensors_are_in_layer_order(pool: RegionPool) -> None:
    named = {f"model.layers.{i}.w": torch.ones(1) for i in (10, 2, 1)}
    with build("c", named_tensors=named, pool=pool) as checkpoint:
        assert [t.name for t in checkpoint.metas()[0].tensors] == [f"model.layers.{i}.w" for i in (1, 2, 10)]


@pytest.fixture
def base() -> torch.Tensor:
    """On a GPU, whose driver opens files of its own when it is first used: before `pool` counts them."""
    return torch.randn(300, 200, device="cuda")


@pytest.mark.gpu
def test_gpu_tensors(base: torch.Tensor, pool: RegionPool) -> None:
    with build("c", named_tensors={"a": base, "b": base.t(), "c": base[0, 0]}, pool=pool) as checkpoint:
        check(checkpoint, {"a": base.cpu(), "b": base.t().cpu(), "c": base[0, 0].cpu()})


def test_nothing_at_all(pool: RegionPool, tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "f")
    for arguments in ({}, {"files": [tmp_path / "f"], "select": []}, {"named_tensors": {}}):
        with build("c", pool=pool, **arguments) as checkpoint:  # type: ignore[arg-type]
            assert checkpoint.regions == checkpoint.metas() == ()
            assert checkpoint.nbytes == 0


class Wrapped(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return NotImplemented


class Tagged(torch.nn.Parameter):
    """As engines have them: a parameter with more attributes, and bytes of its own."""


def test_tensors_that_cannot_be_taken(pool: RegionPool) -> None:
    freed = torch.ones(8)
    freed.untyped_storage().resize_(0)
    sharded = torch.ones(2).as_subclass(Tagged)
    sharded.placements = ()  # type: ignore[attr-defined]
    cases: list[tuple[object, str]] = [
        (sharded, "full_tensor"),
        (torch.ones(2).as_subclass(Wrapped), "wraps"),
        (torch.eye(3).to_sparse(), "to_dense"),
        (torch.empty(3, device="meta"), "meta device"),
        (freed, "freed"),
        ([1.0], "not a tensor but a list"),
    ]
    if hasattr(torch, "float4_e2m1fn_x2"):  # not in torch 2.6
        cases.append((torch.empty(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4_e2m1fn_x2 cannot be moved"))
    with build("alive", named_tensors={"x": torch.ones(3)}, pool=pool) as alive:
        for bad, reason in cases:
            with pytest.raises(TensorError, match=reason) as caught:
                build("c", named_tensors={"fine": torch.ones(3), "bad": bad}, pool=pool)  # type: ignore[dict-item]
            assert caught.value.tensor == "bad"
        with pytest.raises(TensorError, match="named by strings"):
            build("c", named_tensors={1: torch.ones(3)}, pool=pool)  # type: ignore[dict-item]
        check(alive, {"x": torch.ones(3)})
    with build("c", named_tensors={"tagged": Tagged(torch.ones(3))}, pool=pool) as checkpoint:
        check(checkpoint, {"tagged": torch.ones(3)})


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # torch 2.6, on a CPU
def test_a_real_dtensor(tmp_path: Path) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        value = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
        for sharded in (value, torch.nn.Parameter(value)):
            with RegionPool() as pool, pytest.raises(TensorError, match="full_tensor"):
                build("c", named_tensors={"w": sharded}, pool=pool)
    finally:
        dist.destroy_process_group()


def test_one_name_two_sources(tmp_path: Path, pool: RegionPool) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(1)}, tmp_path / "f")
    save_file({"b": torch.ones(2)}, tmp_path / "g")
    with pytest.raises(DuplicateTensorError, match=r"'b' is in both .*/f and .*/g"):
        build("c", files=[tmp_path / "f", tmp_path / "g"], select=["a"], pool=pool)
    with pytest.raises(DuplicateTensorError, match="'a' is in both the named tensors and"):
        build("c", files=[tmp_path / "f"], named_tensors={"a": torch.ones(3)}, pool=pool)
    with pytest.raises(DuplicateTensorError):
        build("c", files=[tmp_path / "f", tmp_path / "f"], pool=pool)
    with pytest.raises(CheckpointError, match="'z' is in none of the 1 files"):
        build("c", files=[tmp_path / "f"], select=["a", "z"], pool=pool)


def test_a_failed_build_leaves_nothing(tmp_path: Path, pool: RegionPool) -> None:
    tensors = {"a": fill("float32", (1000, 1000)), "b": fill("int16", (77,))}
    save_file(tensors, tmp_path / "good")
    (tmp_path / "bad").write_bytes((tmp_path / "good").read_bytes()[:-1])
    first = build("first", files=[tmp_path / "good"], pool=pool)
    kept = {r.generation for r in first.regions}
    first.close(keep=True)
    size = pool.kept_bytes
    before = len(os.listdir("/proc/self/fd"))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for arguments, error in (
        ({"files": [tmp_path / "good", tmp_path / "bad"]}, FileFormatError),
        ({"files": [tmp_path / "good", tmp_path / "none"]}, CheckpointError),
        ({"files": [tmp_path / "good"], "progress": interrupt}, KeyboardInterrupt),
    ):
        with pytest.raises(error):
            build("c", pool=pool, **arguments)  # type: ignore[arg-type]
        assert pool.kept_bytes == size
        assert len(os.listdir("/proc/self/fd")) == before
    with build("again", files=[tmp_path / "good"], pool=pool) as again:
        assert {r.generation for r in again.regions} == kept
        check(again, tensors)


@pytest.fixture
def memory_file() -> Iterator[Path]:
    path = Path(f"/dev/shm/checkpoint-engine-test-{os.getpid()}.safetensors")
    yield path
    path.unlink(missing_ok=True)


def test_files_in_memory_are_mapped_in_place(memory_file: Path, tmp_path: Path, pool: RegionPool) -> None:
    tensors = {"a": fill("float32", (1000,)), "b": fill("bfloat16", (3, 5)), "e": torch.empty(0)}
    save_file(tensors, memory_file)
    save_file({"c": torch.ones(3)}, tmp_path / "f")
    expected = tensors | {"c": torch.ones(3), "d": torch.zeros(2)}
    arguments = {"files": [memory_file, tmp_path / "f"], "named_tensors": {"d": torch.zeros(2)}, "pool": pool}
    with build("c", **arguments) as checkpoint:  # type: ignore[arg-type]
        check(checkpoint, expected)
        assert os.fstat(checkpoint.regions[0].fd).st_ino == memory_file.stat().st_ino
        assert [r.in_place for r in checkpoint.regions] == [True, False, False]
    with build("c", inplace=False, **arguments) as checkpoint:  # type: ignore[arg-type]
        check(checkpoint, expected)
        assert not any(r.in_place for r in checkpoint.regions)
    (tmp_path / "link").symlink_to(memory_file)
    with build("c", files=[tmp_path / "link"], select=["b"], pool=pool) as checkpoint:
        check(checkpoint, {"b": tensors["b"]})
        assert checkpoint.regions[0].in_place
    assert memory_file.exists()
    with pytest.raises(CheckpointError):
        build("c", files=[memory_file, tmp_path / "none"], delete_inplace_files=True, pool=pool)
    assert memory_file.exists()
    with build("c", delete_inplace_files=True, **arguments) as checkpoint:  # type: ignore[arg-type]
        assert not memory_file.exists()
        assert (tmp_path / "f").exists()
        check(checkpoint, expected)
