"""Broadcast updates between real servers and real workers: every worker has every tensor, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_engine.server import UpdateReport
from helpers.fleet import Orders, Worker, digests, request, server, share_of, tensors, workers
from helpers.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("sharing")
KIB = 1 << 10


def _update_three_times(rank: int, world_size: int, crew: list[Worker]) -> list[Any]:
    seen = []
    with server(bucket_bytes=64 * KIB) as ps:
        for seed in range(3):
            ps.register_checkpoint(f"c{seed}", named_tensors=share_of(tensors(seed), rank, world_size))
            ps.gather_metas(f"c{seed}")
            report = ps.update(f"c{seed}", request(crew[rank], rank), version=f"v{seed}" if seed else None)
            seen.append((report, crew[rank].state()))
            ps.unregister_checkpoint(f"c{seed}")
    return seen


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_worker_has_every_tensor(world_size: int) -> None:
    with workers(world_size) as crew:
        results = run_ranks(_update_three_times, world_size, crew)
    for rank, seen in enumerate(results):
        for seed, (report, (version, dirty, params, calls)) in enumerate(seen):
            assert params == digests(tensors(seed)), f"rank {rank}, update {seed}"
            assert not dirty
            assert version == report.version
            assert report.version == (f"v{seed}" if seed else results[0][0][0].version)
            assert len(calls) > 1
            _check_report(report, world_size, seed)
    assert results[0][0][0].version.startswith("c0@")


def _check_report(report: UpdateReport, world_size: int, seed: int) -> None:
    assert report.nbytes == sum(t.nbytes for t in tensors(seed).values())
    assert set(report.stages) == {"lift", "load", "load_weights", "post_hook", "worker", "verify"} | (
        {"share"} if world_size > 1 else set()
    )
    assert len(report.ranks) == world_size
    assert sum(stages["lift"].nbytes for stages in report.ranks) >= report.nbytes
    assert all(0 <= s.seconds <= report.seconds for stages in report.ranks for s in stages.values())
    assert report.to_dict()["passes"] == 1


def _update_with(rank: int, world_size: int, crew: list[Worker], settings: dict[str, Any], staging: int) -> Any:
    from checkpoint_engine.devices.cpu import CpuDevice

    CpuDevice.staging_slots = staging
    everything = tensors(7, layers=12)
    everything["model.embed_tokens.weight"] = torch.arange(300 * KIB, dtype=torch.int32)  # larger than a bucket, and the ring
    with server(**settings) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(everything, rank, world_size))
        ps.gather_metas("c")
        ps.update("c", request(crew[rank], rank))
        return crew[rank].state()[2] == digests(everything)


@pytest.mark.parametrize("staging", [0, 2])
@pytest.mark.parametrize("sizes", [(64 * KIB, 64 * KIB), (64 * KIB, 130 * KIB), (16 * KIB, 2048 * KIB)])
def test_any_ring_and_staging(sizes: tuple[int, int], staging: int) -> None:
    settings = {"bucket_bytes": sizes[0], "ring_bytes": sizes[1]}
    with workers(2) as crew:
        assert run_ranks(_update_with, 2, crew, settings, staging) == [True, True]


def _one_owner(rank: int, world_size: int, crew: list[Worker]) -> Any:
    everything = tensors(3)
    with server() as ps:
        if rank == world_size - 1:
            ps.register_checkpoint("c", named_tensors=everything)
        ps.gather_metas("c")
        ps.update("c", request(crew[rank], rank))
        return crew[rank].state()[2] == digests(everything)


def test_a_rank_that_holds_nothing_receives_everything() -> None:
    with workers(2) as crew:
        assert run_ranks(_one_owner, 2, crew) == [True, True]


def _striped(rank: int, world_size: int, crew: list[Worker], files: list[str]) -> Any:
    with server(bucket_bytes=64 * KIB) as ps:
        ps.register_checkpoint("c", files=files, stripe=True)
        ps.gather_metas("c")
        held = ps.get_metas().ranks[rank].nbytes
        report = ps.update("c", request(crew[rank], rank))
        return held, report.nbytes, crew[rank].state()[2]


def test_files_are_striped_over_the_ranks(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    everything = tensors(5)
    names = sorted(everything)
    save_file({n: everything[n] for n in names[::2]}, tmp_path / "a.safetensors")
    save_file({n: everything[n] for n in names[1::2]}, tmp_path / "b.safetensors")
    with workers(2) as crew:
        results = run_ranks(_striped, 2, crew, [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")])
    total = sum(t.nbytes for t in everything.values())
    assert sum(held for held, _, _ in results) == total
    assert all(held > 0.4 * total for held, _, _ in results)
    assert all(nbytes == total and params == digests(everything) for _, nbytes, params in results)


def _passes(rank: int, world_size: int, crew: list[Worker], asked: dict[int, int]) -> Any:
    with server(bucket_bytes=64 * KIB) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        ps.update("c", lambda handles: None if rank else _ask_all(crew, handles, asked))
        report = ps.update("c", lambda handles: None if rank else _ask_all(crew, handles, {}))
        return report.passes, crew[rank].state()


def _ask_all(crew: list[Worker], handles: list[tuple[str, str]], asked: dict[int, int]) -> None:
    """As a replica's leader: its workers in turn have the command, then all are waited for."""
    for rank, (_, handle) in enumerate(handles):
        crew[rank].pipe.send(("update", handle, Orders(passes=asked.get(rank, 1))))
    for worker in crew[: len(handles)]:
        ok, answer = worker.pipe.recv()
        if not ok:
            raise RuntimeError(answer)


@pytest.mark.parametrize("asked", [{0: 2, 1: 2}, {1: 3}, {0: 3, 1: 2}])
def test_a_worker_that_says_hello_again_is_served_again(asked: dict[int, int]) -> None:
    with workers(2) as crew:
        results = run_ranks(_passes, 2, crew, asked)
    for passes, (_, dirty, params, _) in results:
        assert passes == 1  # of the update after it
        assert not dirty
        assert params == digests(tensors(1))


def _late(rank: int, world_size: int, crew: list[Worker]) -> Any:
    """req_func returns at once, as with a queue; the workers come afterwards."""
    with server() as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        report = ps.update("c", lambda handles: crew[rank].pipe.send(("update", handles[rank][1], Orders())))
        assert crew[rank].pipe.recv() == (True, [report.version])
        return crew[rank].state()[2] == digests(tensors(1))


def test_requests_that_return_before_the_workers_come() -> None:
    with workers(3) as crew:
        assert run_ranks(_late, 3, crew) == [True] * 3


def _lagging(rank: int, world_size: int, crew: list[Worker]) -> Any:
    with server(bucket_bytes=64 * KIB, ring_bytes=192 * KIB) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        ps.update("c", request(crew[rank], rank, Orders(lag=0.01 * (rank + 1))))
        return crew[rank].state()[2] == digests(tensors(1))


def test_a_device_that_is_behind_its_loader() -> None:
    """Buckets are reported when their copies are over, the last ones before the worker is ready."""
    with workers(2) as crew:
        assert run_ranks(_lagging, 2, crew) == [True, True]
