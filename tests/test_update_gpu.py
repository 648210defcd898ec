"""Updates on GPUs: what the other test_update files show on a CPU, over peer copies and NCCL, and CUDA IPC. One rank a GPU."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

import test_update_broadcast as broadcast
import test_update_faults as faults
from checkpoint_engine.errors import UpdateError
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.transport.session import prepare_directory
from helpers.fleet import LAST, Orders, Worker, digests, quick, request, server, share_of, tensors, workers
from helpers.ports import free_ports
from helpers.ranks import run_ranks, start_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("sharing")]
KIB = 1 << 10
WORLDS = [n for n in (1, 2, 4) if n <= max(1, torch.cuda.device_count())]
SEVERAL = [n for n in WORLDS if n > 1] or [
    pytest.param(2, marks=pytest.mark.skip(reason="needs two GPUs"))  # type: ignore[list-item]
]


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_worker_has_every_tensor(world_size: int) -> None:
    with workers(world_size) as crew:
        results = run_ranks(broadcast._update_three_times, world_size, crew)
    for seen in results:
        for seed, (_, (_, dirty, params, _)) in enumerate(seen):
            assert params == digests(tensors(seed))
            assert not dirty


def _sizes(rank: int, world_size: int, crew: list[Worker], sizes: tuple[int, int]) -> Any:
    everything = tensors(7, layers=12)
    everything["model.embed_tokens.weight"] = torch.arange(300 * KIB, dtype=torch.int32)
    with server(bucket_bytes=sizes[0], ring_bytes=sizes[1]) as ps:
        ps.register_checkpoint("c", named_tensors={k: v.cuda() for k, v in share_of(everything, rank, world_size).items()})
        ps.gather_metas("c")
        ps.update("c", request(crew[rank], rank))
        ps.update("c", request(crew[rank], rank))
        return crew[rank].state()[2] == digests(everything)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("sizes", [(64 * KIB, 64 * KIB), (64 * KIB, 130 * KIB), (16 * KIB, 2048 * KIB)])
def test_any_ring_and_tensors_from_the_gpu(sizes: tuple[int, int], world_size: int) -> None:
    with workers(world_size) as crew:
        assert all(run_ranks(_sizes, world_size, crew, sizes))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("orders", [Orders(raise_in_bucket=0), Orders(raise_in_bucket=LAST), Orders(raise_in_post_hook=True)])
def test_a_worker_raises(orders: Orders, world_size: int) -> None:
    """Named on every rank, and the next update succeeds on the same communicator."""
    stage, words = ("post_hook", "post-processing") if orders.raise_in_post_hook else ("load", "no room for model.layers")
    with workers(world_size) as crew:
        results = run_ranks(faults._fail_then_heal, world_size, crew, orders, faults.SMALL)
    faults._check_healed(results, world_size - 1, stage, words)


@pytest.mark.parametrize("world_size", SEVERAL)
def test_a_worker_is_killed_in_mid_load(world_size: int) -> None:
    with workers(2 * world_size, world_size) as crew:
        texts = run_ranks(faults._worker_dies, world_size, crew, Orders(die_in_bucket=2))
    assert all("worker of rank 0" in text and "is gone" in text for text in texts), texts


def _two_worlds(rank: int, world_size: int, crew: list[Worker], port: int) -> Any:
    """The last rank is killed while its buckets are on their way; the others make a new world with its successor."""
    victim = world_size - 1

    def killer(nbytes: int) -> None:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    with server(**faults.SMALL, ring_bytes=64 * KIB) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(UpdateError) as caught:
            ps.update("c", request(crew[rank], rank), progress=killer)
    return str(caught.value), _second_world(0, 1, rank, world_size, crew, port)


def _second_world(_: int, __: int, rank: int, world_size: int, crew: list[Worker], port: int) -> bool:
    with ParameterServer(rank=rank, world_size=world_size, master_port=port, settings=quick()) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(2), rank, world_size))
        ps.gather_metas("c")
        ps.update("c", request(crew[rank], rank))
        return crew[rank].state()[1:3] == (False, digests(tensors(2)))


@pytest.mark.parametrize("world_size", SEVERAL)
def test_a_server_is_killed_in_mid_share(world_size: int) -> None:
    victim, port = world_size - 1, free_ports()
    with (
        workers(2 * world_size, world_size) as crew,
        start_ranks(_two_worlds, world_size, crew, port, may_die=[victim]) as ranks,
    ):
        ranks.processes[victim].join(40)
        spare = [*crew[:victim], crew[world_size + victim]]
        with start_ranks(_second_world, 1, victim, world_size, spare, port) as successor:
            assert successor.results(40) == [True]
        results = ranks.results(40)
    prepare_directory(quick())
    assert all(f"rank {victim}" in text and healed for text, healed in results[:victim]), results


def _many(rank: int, world_size: int, crew: list[Worker]) -> Any:
    free = []
    with server(bucket_bytes=64 * KIB) as ps:
        for step in range(50):
            ps.register_checkpoint(
                f"s{step}", named_tensors=share_of(tensors(step), rank, world_size), use_shared_memory_pool=True
            )
            ps.gather_metas(f"s{step}")
            ps.update(f"s{step}", request(crew[rank], rank))
            ps.unregister_checkpoint(f"s{step}")
            free.append(torch.cuda.mem_get_info()[0])
        return crew[rank].state()[2] == digests(tensors(49)), free[0] - free[-1]


@pytest.mark.parametrize("world_size", WORLDS)
def test_fifty_updates(world_size: int) -> None:
    with workers(world_size) as crew:
        results = run_ranks(_many, world_size, crew)
    assert [equal for equal, _ in results] == [True] * world_size
    assert all(lost <= 32 << 20 for _, lost in results), f"device memory grew: {results}"


def _freed(rank: int, world_size: int, crew: list[Worker]) -> list[int]:
    torch.zeros(1, device="cuda")
    with server(free_after_update=True) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        free = []
        for _ in range(6):
            ps.gather_metas("c")
            ps.update("c", request(crew[rank], rank))
            ps.store_based_barrier()  # memory that another rank has mapped is there until it has given its own back
            free.append(torch.cuda.mem_get_info()[0] >> 20)
    return free


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_setting_gives_everything_back(world_size: int) -> None:
    """What libraries keep of a first time (NCCL some 290 MiB) does not grow with a second."""
    with workers(world_size) as crew:
        results = run_ranks(_freed, world_size, crew)
    assert all(free[1] - free[-1] <= 32 for free in results), f"MiB free after each update: {results}"
