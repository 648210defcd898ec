"""Recorded loads on GPUs: what test_recorded_session shows on a CPU, by the kernel, out of rings and out of host memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import test_recorded_session as session
from checkpoint_engine.errors import UpdateError
from helpers.fleet import Worker, server, share_of
from helpers.ranks import run_ranks
from helpers.recorded import Deed, checkpoint, engines, fresh

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("sharing"), pytest.mark.timeout(180)]
WORLDS = [n for n in (1, 2) if n <= max(1, torch.cuda.device_count())]
METHODS = ["broadcast", "pull"]  # pulled, all of the checkpoint comes in two groups of buckets


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT_ENGINE_RECORDED_LOADS", "on")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_proved_once_then_replayed(world_size: int, method: str) -> None:
    for seen in session._run([""] * world_size, method, 10):
        assert [each.ways for each in seen] == [("proved",)] + [("replayed",)] * 9
        assert [each.passes for each in seen] == [2] + [1] * 9
        assert {each.method for each in seen[1:]} == ({"pull"} if method == "pull" else {seen[0].method})
        assert all(each.loaded == [] and each.replayed == len(checkpoint(0)) for each in seen[1:])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "kind", ["casts", "transposes into another dtype", "writes twice", "keeps", "writes nothing", "replaces"]
)
def test_what_is_no_copy_stays_the_loaders(kind: str, method: str) -> None:
    """On the last rank of as many as there are GPUs. Pulled in groups of buckets, q and k may all come in one call: then nothing
    is kept until another one, and all of it is copies."""
    kinds = [""] * (WORLDS[-1] - 1) + [kind]
    *others, last = session._run(kinds, method)
    assert all(each.loaded == [] for seen in others for each in seen[1:])
    if (kind, method) != ("keeps", "pull"):
        assert all(each.loaded for each in last)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("deed", [Deed("raise", "replay", 1), Deed("raise", "post_hook"), Deed("move"), Deed("permute")])
def test_failures_and_changes(deed: Deed, method: str) -> None:
    last = session._run([""] * WORLDS[-1], method, 5, {(2, WORLDS[-1] - 1): deed})[-1]
    assert isinstance(last[2], str) == (deed.what == "raise")
    assert last[4].ways == ("replayed",)


def _auto(rank: int, world_size: int, crew: list[Worker]) -> Any:
    """As the cost model chooses, in two memories, each until it is pulled from."""
    seen: list[list[tuple[bool, tuple[str, ...], bool]]] = []
    with server(bucket_bytes=4096) as ps:
        for _ in range(2):
            if "c" in ps._registry.names():
                ps.unregister_checkpoint("c", force=True)
            seen.append([])
            while len(seen[-1]) < 10 and not (seen[-1] and seen[-1][-1][0]):
                weights = checkpoint(len(seen[-1]))
                if "c" in ps._registry.names():
                    ps.unregister_checkpoint("c")
                ps.register_checkpoint("c", named_tensors=share_of(weights, rank, world_size), use_shared_memory_pool=True)
                ps.gather_metas("c")
                report = ps.update("c", session._ask(crew[rank], rank, Deed()))
                right = crew[rank].ask("state")[2] == fresh(weights, rank, world_size)
                seen[-1].append((report.method == "pull", report.ways, right))
    return seen


@pytest.mark.parametrize("world_size", WORLDS)
def test_pull_once_the_regions_are_ready(world_size: int) -> None:
    """Proved, then replayed while regions are mapped, until they are ready, then pulled; again so after the memory became another
    one, which is not mapped before it was used twice."""
    with engines([""] * world_size) as crew:
        for seen in run_ranks(_auto, world_size, crew, timeout=120):
            assert all(right for memory in seen for _, _, right in memory)
            ways = [ways for memory in seen for _, ways, _ in memory]
            assert ways == [("proved",)] + [("replayed",)] * (len(ways) - 1)
            for memory in seen:
                pulled = [pull for pull, _, _ in memory]
                assert len(pulled) >= 3
                assert pulled == [False] * (len(pulled) - 1) + [True]


def _dies(rank: int, world_size: int, crew: list[Worker]) -> Any:
    with server(method="pull", bucket_bytes=8192) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(checkpoint(1), rank, world_size))
        ps.gather_metas("c")
        ps.update("c", session._ask(crew[rank], rank, Deed()))
        with pytest.raises(UpdateError) as caught:
            ps.update("c", session._ask(crew[rank], rank, Deed("die", "replay", 1) if rank == 0 else Deed()))
        alive = crew[world_size] if rank == 0 else crew[rank]
        ps.update("c", session._ask(alive, rank, Deed()))
        return caught.value.rank, alive.ask("state")[2] == fresh(checkpoint(1), rank, world_size)


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_worker_dies_while_it_pulls(world_size: int) -> None:
    with engines([""] * world_size) as crew, engines([""] * world_size) as spare:
        assert run_ranks(_dies, world_size, [*crew, spare[0]], timeout=120) == [(0, True)] * world_size
