"""Sharing by copies into the other ranks' rings: what arrives when, and who may still write where after a failure."""

from __future__ import annotations

import datetime
import gc
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_engine.devices.base import Event, Mapping, Ring, Stream
from checkpoint_engine.devices.cpu import CpuDevice
from checkpoint_engine.errors import DeviceError, ManifestError, UpdateError
from checkpoint_engine.server import lane as lanes
from checkpoint_engine.server.lane import Lane
from checkpoint_engine.transport.collective import Collective, GlooCollective, Ranks
from checkpoint_engine.transport.push import PushCollective
from checkpoint_engine.transport.session import prepare_directory
from helpers.fleet import Handles, Orders, Worker, digests, quick, request, server, share_of, tensors, workers
from helpers.ranks import _context, run_ranks, start_ranks

KIB = 1 << 10
SMALL = {"bucket_bytes": 64 * KIB}


def _fused(seed: int) -> dict[str, torch.Tensor]:
    """Layers in which two matrices must be loaded together (planning.order.TOGETHER), and different ranks hold them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.self_attn.{part}.weight": torch.randn(64, 65, generator=generator)
        for layer in range(4)
        for part in ("kv_a_proj_with_mqa", "o_proj", "q_a_proj")
    }


def _late_owner(rank: int, world_size: int, crew: list[Worker], late: int) -> bool:
    if rank == late:
        push = PushCollective._push

        def slowly(self: PushCollective, *args: Any) -> None:
            time.sleep(0.2)
            push(self, *args)

        setattr(PushCollective, "_push", slowly)  # noqa: B010
    everything = _fused(5)
    with server(bucket_bytes=16 * KIB) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(everything, rank, world_size))
        ps.gather_metas("c")
        assert ps.update("c", request(crew[rank], rank)).method == "copies"
        return crew[rank].state()[2] == digests(everything)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_bucket_of_several_owners_is_loaded_when_all_have_brought_their_part(late: int) -> None:
    with workers(3) as crew:
        assert run_ranks(_late_owner, 3, crew, late) == [True] * 3


def _cannot_map(rank: int, world_size: int, crew: list[Worker], foreseen: bool) -> Any:
    """Rank 1 fails to map the others' rings, once."""

    def fails(*_: Any) -> Any:
        raise DeviceError("cudaIpcOpenMemHandle", 217, "no peer access") if foreseen else RuntimeError("context is gone")

    with server(**SMALL) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(CpuDevice, "open_peer", fails)
            methods = [ps.update("c", request(crew[rank], rank)).method]
        methods.append(ps.update("c", request(crew[rank], rank), version="again").method)
        return methods, crew[rank].state()[:3]


@pytest.mark.parametrize("foreseen", [True, False])
def test_ranks_that_cannot_copy_broadcast_and_stay_in_step(foreseen: bool) -> None:
    with workers(3) as crew:
        results = run_ranks(_cannot_map, 3, crew, foreseen)
    assert results == [(["broadcast", "copies"], ("again", False, digests(tensors(1))))] * 3


def _cannot_meet_again(rank: int, world_size: int, crew: list[Worker]) -> Any:
    """In the second update nobody waits for the others to have mapped; rank 1 cannot."""

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError("descriptor is another file by now")

    with server(**SMALL) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        ps.update("c", request(crew[rank], rank))
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(PushCollective, "meet", fails)
            with pytest.raises(UpdateError) as caught:
                ps.update("c", request(crew[rank], rank))
        lane = ps._keeper._lane
        kept = lane is not None and not lane.damaged
        ps.update("c", request(crew[rank], rank), version="healed")
        return (caught.value.rank, caught.value.stage), kept, crew[rank].state()[:3]


def test_a_rank_that_cannot_map_what_it_mapped_before_has_stopped_and_says_so() -> None:
    with workers(3) as crew:
        results = run_ranks(_cannot_meet_again, 3, crew)
    assert results == [((1, "join"), True, ("healed", False, digests(tensors(1))))] * 3


def _cannot_use(rank: int, world_size: int, crew: list[Worker]) -> Any:
    """Rank 1 joins the kept communicator of an earlier update, and then has no memory for staging."""

    def fails(*_: Any) -> Any:
        raise ManifestError("no memory for staging")

    with server(**SMALL, peer_copies=False, join_timeout=4.0) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        ps.update("c", request(crew[rank], rank))
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(Lane, "use", fails)
            with pytest.raises(UpdateError, match="no memory for staging"):
                ps.update("c", request(crew[rank], rank))
        ps.update("c", request(crew[rank], rank), version="healed")
        return crew[rank].state()[:3]


def test_a_rank_that_gave_up_its_place_in_the_communicator_makes_the_next_one_too() -> None:
    with workers(2) as crew:
        assert run_ranks(_cannot_use, 2, crew) == [("healed", False, digests(tensors(1)))] * 2


class _Stuck(Collective):
    """Its first `abandon` finds that it cannot be stopped; the second has nothing left to stop, as NCCL's communicator."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.asked = 0

    def broadcast(
        self,
        target: torch.Tensor,
        source: torch.Tensor | None,
        root: int,
        stream: Stream,
        ready: Event | None,
        ranks: Ranks = None,
    ) -> Event:
        return stream.record()

    def abandon(self, missing: Any) -> bool:
        self.asked += 1
        return self.asked > 1

    def close(self) -> None:
        pass


def test_memory_that_could_not_be_made_safe_once_stays_unsafe(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(lanes, "_quarantine", kept)
    lane = Lane(CpuDevice(), 0, 4096, 4096)
    lane.use(_Stuck())
    lane.abandon()
    lane.abandon([1])
    lane.close()
    assert len(kept) == 1
    over, memory = kept.pop()
    assert not over()
    memory.close()


def test_rings_are_mapped_for_the_first_copy_and_unmapped_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before: a device may lift nothing while it maps. Their owners may free them when all have unmapped them."""
    device, mapped = CpuDevice(), threading.Event()

    def open_peer(*args: Any) -> Mapping:
        mapped.set()
        return device.open_ring(*args)

    monkeypatch.setattr(device, "open_peer", open_peer)
    with (
        device.allocate_ring(4096) as one,
        device.allocate_ring(4096) as other,
        PushCollective(device, 0, one, 5.0) as copies,
        PushCollective(device, 1, other, 5.0) as idle,
        device.stream("share") as stream,
    ):
        for each in (copies, idle):
            each.meet([copies.member, idle.member], at_once=False)
        assert copies._pushing.record().wait(5) and not mapped.is_set()
        one.tensor.fill_(7)
        idle.broadcast(other.tensor, None, 0, stream, None)
        assert copies.broadcast(one.tensor, None, 0, stream, None).wait(5) and mapped.is_set()
        assert bool((other.tensor == 7).all())
        for each in (copies, idle):
            each.rest()
            assert not each._rings


def _memfds() -> int:
    gc.collect()
    return sum("memfd:checkpoint-engine" in os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.is_symlink())


def _dies_at(rank: int, world_size: int, crew: list[Worker], step: str) -> Any:
    def die(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    failed = _update_in_vain(rank, world_size, crew, step, die)
    left = [t.name for t in threading.enumerate() if t.name in ("push", "land")]
    return *failed, left, len(lanes._quarantine), _memfds()


def _update_in_vain(rank: int, world_size: int, crew: list[Worker], step: str, die: Any) -> tuple[int, str]:
    with server(**SMALL, ring_bytes=64 * KIB) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        if step == "proven":
            ps.update("c", request(crew[rank], rank))
        if rank == 1:
            setattr(PushCollective, "_open_rings" if step == "proven" else step, die)
        with pytest.raises(UpdateError) as caught:
            ps.update("c", request(crew[rank], rank))
        return caught.value.rank, str(caught.value)


@pytest.mark.parametrize("step", ["__init__", "meet", "_open_rings", "proven", "broadcast", "_push", "_land", "rest"])
def test_a_server_is_killed_at_each_step(step: str) -> None:
    with workers(3) as crew, start_ranks(_dies_at, 3, crew, step, may_die=[1]) as ranks:
        results = ranks.results(40)
    prepare_directory(quick())  # what the killed server left behind goes when the next one comes
    for rank, text, left, quarantined, memfds in (results[0], results[2]):
        assert rank == 1, text
        assert "rank 1" in text
        assert (left, quarantined, memfds) == ([], 0, 0)


def _stop_before_copying() -> None:
    """Stop this process, once, when a copy into another rank's ring is its next step."""
    stopped: list[int] = []
    wait = PushCollective._has_room

    def stop(self: PushCollective, *args: Any) -> bool:
        room = wait(self, *args)
        if room and not stopped:
            stopped.append(1)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.2)  # all threads stop, but not at once: this one must not have copied by then
        return room

    setattr(PushCollective, "_has_room", stop)  # noqa: B010


def _stands_still(rank: int, world_size: int, crew: list[Worker], pipe: Connection) -> Any:
    """Rank 1 goes on when rank 0 has given up."""
    rings: list[Ring] = []

    def ask(handles: Handles) -> None:
        assert ps._keeper._lane is not None
        rings.append(ps._keeper._lane.ring)
        request(crew[rank], rank)(handles)

    if rank == 1:
        _stop_before_copying()
    with server(**SMALL, join_timeout=30.0) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(UpdateError) as caught:
            ps.update("c", ask, timeout=datetime.timedelta(seconds=30 if rank else 4))
        first = rings[0].tensor  # stays mapped by this
        if rank == 0:
            first.zero_()
            pipe.send("gave up")
        second = tensors(2)
        ps.register_checkpoint("d", named_tensors=share_of(second, rank, world_size))
        ps.gather_metas("d")
        ps.update("d", ask, version="healed")
        written_late = bool(first.any())
        ps.update("d", ask, version="healed")  # by now rank 1 has said that it stopped
        return str(caught.value), rings[0] is rings[1], written_late, len(lanes._quarantine), crew[rank].state()[:3]


def test_a_server_that_wakes_up_late_writes_into_no_memory_that_is_used_again() -> None:
    mine, theirs = _context.Pipe()
    with workers(2) as crew, start_ranks(_stands_still, 2, crew, theirs) as ranks:
        assert mine.poll(40)
        mine.recv()
        ranks.kill(1, signal.SIGCONT)
        (text, same_ring, written_late, quarantined, state), (*_, other) = ranks.results(40)
    mine.close()
    theirs.close()
    assert "gave up after 4 s waiting for" in text
    assert "rank 1" in text
    assert (same_ring, written_late, quarantined) == (False, True, 0)
    assert state == other == ("healed", False, digests(tensors(2)))


def _hears(rank: int, world_size: int, crew: list[Worker]) -> Any:
    """Rank 1's engine stands still, and what moves rank 0's bytes knows that it failed though no process is gone."""

    def failed(_: Collective) -> None:
        raise DeviceError("an NCCL operation in the background", 6, "remote process exited or there was a network error")

    if rank == 0:
        setattr(GlooCollective, "check", failed)  # noqa: B010
    orders = Orders(stop_in_bucket=1 if rank else None)
    with server(**SMALL, ring_bytes=64 * KIB, peer_copies=False, timeout=600.0) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(UpdateError) as caught:
            ps.update("c", request(crew[rank], rank, orders))
        return caught.value.rank, caught.value.stage, "NCCL operation in the background" in str(caught.value)


def test_a_communicator_that_failed_by_itself_ends_the_update() -> None:
    with workers(2) as crew:
        assert run_ranks(_hears, 2, crew) == [(0, "share", True)] * 2


def _deadlines(rank: int, world_size: int, crew: list[Worker]) -> Any:
    said: list[float | None] = []

    def ask(handles: Any) -> None:
        collective = ps._keeper.collective
        said.append(None if collective is None else collective.seconds)
        request(crew[rank], rank)(handles)

    with server(**SMALL, peer_copies=False, timeout=600.0) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        ps.update("c", ask, timeout=datetime.timedelta(seconds=15))
        ps.update("c", ask, timeout=datetime.timedelta(seconds=12))
        ps.update("c", ask)
    return said


def test_an_updates_deadline_is_its_broadcasts() -> None:
    with workers(2) as crew:
        assert run_ranks(_deadlines, 2, crew) == [[15.0, 12.0, 600.0]] * 2
