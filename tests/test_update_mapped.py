"""On one host's CPU workers load straight from the servers' memory: the same results, the same manners when it fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import test_update_faults as faults
from checkpoint_engine.devices.base import SharedHandle, get_device
from checkpoint_engine.errors import ProtocolError, SettingsError
from checkpoint_engine.transport.messages import Attach
from checkpoint_engine.worker.attached import mappings
from helpers.fleet import LAST, Orders, Worker, digests, request, server, share_of, tensors, workers
from helpers.ranks import run_ranks


def _updates(rank: int, world_size: int, crew: list[Worker], off: int | None) -> list[Any]:
    seen = []
    with server(map_regions=rank != off, bucket_bytes=1 << 16) as ps:
        for seed in range(3):
            ps.register_checkpoint(f"c{seed}", named_tensors=share_of(tensors(seed), rank, world_size))
            ps.gather_metas(f"c{seed}")
            report = ps.update(f"c{seed}", request(crew[rank], rank))
            seen.append((report.method, set(report.stages), crew[rank].state()))
            ps.unregister_checkpoint(f"c{seed}")
    return seen


@pytest.mark.parametrize(("world_size", "off"), [(1, None), (2, None), (3, None), (2, 1)])
def test_every_worker_has_every_tensor(world_size: int, off: int | None) -> None:
    """One rank that does not map is enough for none to."""
    with workers(world_size) as crew:
        results = run_ranks(_updates, world_size, crew, off)
    for seen in results:
        for seed, (method, stages, (_, dirty, params, calls)) in enumerate(seen):
            assert method == ("mapped" if off is None else "copies")
            assert ("lift" in stages) == (off is not None)
            assert params == digests(tensors(seed))
            assert not dirty
            assert len(calls) > 4


def _chooses(rank: int, world_size: int, crew: list[Worker]) -> list[str]:
    with server(map_regions=True) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(SettingsError, match="method"):
            ps.update("c", request(crew[rank], rank), method="telepathy")
        return [ps.update("c", request(crew[rank], rank), method=method).method for method in (None, "broadcast", "pull")]


def test_one_update_by_another_method() -> None:
    with workers(2) as crew:
        assert run_ranks(_chooses, 2, crew) == [["mapped", "copies", "mapped"]] * 2


@pytest.mark.parametrize("orders", [Orders(raise_in_bucket=0), Orders(raise_in_bucket=LAST), Orders(raise_in_post_hook=True)])
def test_a_worker_raises(orders: Orders) -> None:
    stage, words = ("post_hook", "post-processing") if orders.raise_in_post_hook else ("load", "no room for model.layers")
    with workers(2) as crew:
        results = run_ranks(faults._fail_then_heal, 2, crew, orders, {**faults.SMALL, "map_regions": True})
    faults._check_healed(results, 1, stage, words)


def _files(rank: int, world_size: int, crew: list[Worker], file: str) -> Any:
    with server(map_regions=True) as ps:
        ps.register_checkpoint("c", files=[file], stripe=True)
        ps.gather_metas("c")
        report = ps.update("c", request(crew[rank], rank))
        return report.method, crew[rank].state()[2] == digests(tensors(4))


def test_tensors_that_their_file_does_not_align(tmp_path: Path) -> None:
    """safetensors files are mapped as they are, whatever their header's length does to the tensors behind it."""
    from safetensors.torch import save

    data = save(tensors(4))
    header = int.from_bytes(data[:8], "little")
    shifted = (header + 1).to_bytes(8, "little") + data[8 : 8 + header] + b" " + data[8 + header :]
    (tmp_path / "odd.safetensors").write_bytes(shifted)
    with workers(2) as crew:
        assert run_ranks(_files, 2, crew, str(tmp_path / "odd.safetensors")) == [("mapped", True)] * 2


def test_files_in_place_cannot_be_sealed_and_are_copied(shm_dir: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors(4), shm_dir / "a.safetensors")
    with workers(2) as crew:
        assert run_ranks(_files, 2, crew, str(shm_dir / "a.safetensors")) == [("copies", True)] * 2


def _scribbler(rank: int, world_size: int, crew: list[Worker]) -> Any:
    with server(map_regions=True) as ps:
        ps.register_checkpoint("c", named_tensors={"a": torch.arange(1000)})
        ps.gather_metas("c")
        ps.update("c", request(crew[0], 0, Orders(scribble=True)))
        ps.update("c", request(crew[0], 0))
        return crew[0].state()[2] == digests({"a": torch.arange(1000)})


def test_a_loader_that_writes_into_its_tensors_harms_nobody() -> None:
    with workers(1) as crew:
        assert run_ranks(_scribbler, 1, crew) == [True]


@pytest.mark.parametrize(
    ("memories", "ahead", "sent"),
    [(2, 0, 3), (3, 0, 2), (0, 2, 1), (1, 1, 3)],
    ids=["one cannot be mapped", "too few", "too few ahead", "too many"],
)
def test_no_descriptor_is_left_open_when_the_memory_cannot_be_mapped(memories: int, ahead: int, sent: int) -> None:
    """None is sealed, so that the first that is to be mapped is refused."""
    descriptors = tuple(os.memfd_create(f"region-{number}", os.MFD_ALLOW_SEALING) for number in range(sent))
    handle = SharedHandle("region", 4096)
    with pytest.raises(ProtocolError):
        list(mappings(Attach(0, (handle,) * memories, "plan", (), (handle,) * ahead), descriptors, get_device("cpu")))
    assert [number for number in descriptors if os.path.exists(f"/proc/self/fd/{number}")] == []
