"""The names, signatures and habits that existing callers of the contract rely on."""

from __future__ import annotations

import datetime
import inspect
import pickle
import typing
from typing import Any

import pytest
import torch
import torch.distributed as dist

import checkpoint_engine
from checkpoint_engine import errors
from checkpoint_engine.engines.base import Engine, Handles
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.worker import VllmColocateWorkerExtension, update_weights_from_ipc
from helpers.fleet import Worker, digests, quick, request, server, share_of, tensors, workers
from helpers.ranks import run_ranks


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("method", "keywords"),
    [
        ("__init__", "rank world_size auto_pg gpu_count mem_fraction master_addr master_port"),
        ("register_checkpoint", "files named_tensors use_shared_memory_pool use_inplace_pin_memory"),
        ("init_process_group", "timeout"),
        ("update", "timeout ranks"),
    ],
)
def test_keywords(method: str, keywords: str) -> None:
    parameters = _parameters(getattr(ParameterServer, method))
    for name in keywords.split():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default is not inspect.Parameter.empty


def test_positional_arguments() -> None:
    assert list(_parameters(ParameterServer.register_checkpoint))[:2] == ["self", "checkpoint_name"]
    assert list(_parameters(ParameterServer.unregister_checkpoint)) == ["self", "checkpoint_name", "force"]
    assert list(_parameters(ParameterServer.update))[:3] == ["self", "checkpoint_name", "req_func"]
    assert list(_parameters(ParameterServer.store_based_barrier)) == ["self", "timeout"]
    assert list(_parameters(update_weights_from_ipc))[:5] == ["zmq_ctx", "zmq_handle", "device_id", "run", "post_hook"]
    assert list(_parameters(VllmColocateWorkerExtension.update_weights_from_ipc)) == ["self", "zmq_handles"]
    assert list(_parameters(checkpoint_engine.request_inference_to_update)) == ["url", "socket_paths", "timeout", "uds"]
    assert typing.get_type_hints(ParameterServer.get_metas)["return"] is Manifest


@pytest.mark.parametrize(
    "error",
    [
        errors.UpdateError(rank=1, host="h", stage="load", reason="no room", dirty=True, aftermath="'a' was restored"),
        errors.WorkerUpdateError("no room", dirty=True),
        errors.DeadlineError("rank 1", 2.0),
        errors.PeerLostError("rank 1"),
        errors.CheckpointNotFoundError("c"),
        errors.IntegrityError(["a", "b"], [1], ["h"]),
        errors.EngineRefusedError("http://e", 500, "no memory"),
        errors.ReplicaError("http://e", 1, "pause", "no answer"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_come_whole_through_pickle(error: errors.CheckpointEngineError) -> None:
    """Ray and process pools send them so; one that cannot be loaded breaks the pool."""
    error.add_note("what is left to do")
    other = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(other) is type(error)
    assert (str(other), vars(other)) == (str(error), vars(error))
    assert other.__notes__ == ["what is left to do"]


def _as_sglang_does(rank: int, world_size: int, crew: list[Worker]) -> Any:
    """Register first, then the default group, then a barrier of torch's own, pickled metas, update twice."""
    with server() as ps:
        ps._p2p_store = None
        ps.register_checkpoint("my-checkpoint", named_tensors=share_of(tensors(1), rank, world_size))
        for _ in range(2):
            ps.init_process_group()
            dist.barrier()
            ps.gather_metas("my-checkpoint")
            metas = pickle.loads(pickle.dumps(ps.get_metas()))  # noqa: S301  (as callers do)
            ps.load_metas(metas)
            dist.barrier()
            ps.update("my-checkpoint", request(crew[rank], rank), ranks=[], timeout=datetime.timedelta(seconds=20))
            assert not dist.is_initialized(), "auto_pg ends the group with the update"
        ps.store_based_barrier()
        return crew[rank].state()[2] == digests(tensors(1))


def test_as_sglang_does() -> None:
    with workers(2) as crew:
        assert run_ranks(_as_sglang_does, 2, crew) == [True, True]


def _own_group(rank: int, world_size: int, crew: list[Worker]) -> Any:
    """auto_pg=False: the caller's group is used for nothing and left alone."""
    dist.init_process_group("gloo")
    with ParameterServer(auto_pg=False, settings=quick()) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.init_process_group()
        ps.gather_metas("c")
        ps.update("c", request(crew[rank], rank))
        dist.barrier()
    dist.destroy_process_group()
    return crew[rank].state()[2] == digests(tensors(1))


def test_the_callers_own_group_is_left_alone() -> None:
    with workers(2) as crew:
        assert run_ranks(_own_group, 2, crew) == [True, True]


def _pool(rank: int, world_size: int) -> Any:
    """Trainers register every step under a new name: the memory must stay the same."""
    seen = []
    with server() as ps:
        for step in range(4):
            ps.register_checkpoint(f"step-{step}", named_tensors=tensors(step), use_shared_memory_pool=True)
            seen.append([region.fd for region in ps._registry[f"step-{step}"].regions])
            assert ps.register_checkpoint(f"other-{step}", named_tensors={"a": torch.ones(3)}) is None
            ps.unregister_checkpoint(f"other-{step}")
            ps.unregister_checkpoint(f"step-{step}")
    return seen


def test_a_pool_is_used_again() -> None:
    seen = run_ranks(_pool, 1)[0]
    assert seen == [seen[0]] * 4
    assert len(seen[0]) > 0


def _versions(rank: int, world_size: int) -> Any:
    """The default version is of the content: not of its spread over ranks, nor of the name alone."""
    with server() as ps:
        versions = []
        for name, seed in (("a", 1), ("b", 2), ("c", 1)):
            everything = {k: v for k, v in tensors(seed).items() if v.numel()}
            ps.register_checkpoint(name, named_tensors=share_of(everything, rank, world_size))
            ps.gather_metas(name)
            versions.append(ps.get_metas().version)
        return versions


def test_the_default_version_names_the_content() -> None:
    alone, spread = run_ranks(_versions, 1)[0], run_ranks(_versions, 2)
    assert spread == [alone, alone]
    a, b, c = (version.split("@") for version in alone)
    assert (a[0], b[0], c[0]) == ("a", "b", "c")
    assert a[1] == c[1] != b[1]
    assert len(a[1]) == 12


class _Replica(Engine):
    """An engine whose worker is a process of the test's."""

    endpoint = "test"

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def wait_ready(self, seconds: float) -> None:
        pass

    def update(self, handles: Handles, *, version: str | None, seconds: float) -> None:
        self.worker.update(handles[0][1])


def _push(rank: int, world_size: int, crew: list[Worker]) -> Any:
    engines = [_Replica(worker) for worker in crew]
    seen = []
    with server() as ps:
        for step in range(3):
            mine = share_of(tensors(step), rank, world_size)
            report = ps.push(mine, engines=engines, version=f"step-{step}")
            seen.append((report.version, crew[rank].state()[0], crew[rank].state()[2] == digests(tensors(step))))
            regions = [region.fd for region in ps._registry["push"].regions]
            seen.append(regions)
    return seen


def test_push_is_the_whole_update_in_one_call() -> None:
    with workers(2) as crew:
        for seen in run_ranks(_push, 2, crew):
            assert seen[::2] == [(f"step-{step}", f"step-{step}", True) for step in range(3)]
            assert seen[1] == seen[3] == seen[5], "the memory is used again"
