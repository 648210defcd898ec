"""What is late, stuck or surprising within one server: an update still ends well, or with its cause named."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_engine.devices.host_digests import HostVerifier
from checkpoint_engine.errors import ManifestError, UpdateError, WorkerUpdateError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.server import ParameterServer, updater
from checkpoint_engine.server.pipeline import Pass
from checkpoint_engine.server.update import UpdateRun
from checkpoint_engine.transport import messages as m
from checkpoint_engine.transport.links import Inbox
from checkpoint_engine.transport.session import connect
from checkpoint_engine.worker import WeightsState, update_weights_from_ipc
from helpers.fleet import Handles, Orders, Worker, digests, quick, request, server, share_of, tensors, workers
from helpers.ranks import run_ranks


@contextlib.contextmanager
def _alone(**changes: Any) -> Iterator[ParameterServer]:
    """A world of one with checkpoint "c"."""
    with ParameterServer(rank=0, world_size=1, settings=quick(bucket_bytes=64 << 10, **changes)) as ps:
        ps.register_checkpoint("c", named_tensors=tensors(1))
        ps.gather_metas("c")
        yield ps


class _Engine:
    """A worker in a thread of this process."""

    def __init__(self) -> None:
        self.loaded: dict[str, torch.Tensor] = {}
        self.state = WeightsState()
        self.error: Exception | None = None

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.loaded.update((name, tensor.clone()) for name, tensor in weights)

    def __call__(self, handles: Handles) -> None:
        try:
            update_weights_from_ipc(None, handles[0][1], 0, run=self.load, state=self.state)
        except WorkerUpdateError as e:
            self.error = e
            raise


def test_a_worker_on_another_device_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(UpdateRun):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._device = "GPU-1"

    monkeypatch.setattr(updater, "UpdateRun", Elsewhere)
    engine = _Engine()
    with _alone() as ps, pytest.raises(UpdateError, match="took the handle of GPU-1") as caught:
        ps.update("c", engine)
    assert caught.value.stage == "attach"
    assert "took the handle of GPU-1" in str(engine.error)


def test_an_unforeseen_error_in_a_pass_ends_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Pass) -> dict[str, m.StageStats]:
        raise ValueError("a clock ran backwards")

    monkeypatch.setattr(Pass, "_stats", broken)
    engine = _Engine()
    with _alone() as ps, pytest.raises(UpdateError, match="ValueError: a clock ran backwards"):
        ps.update("c", engine)
    assert "a clock ran backwards" in str(engine.error)
    assert engine.state.dirty


def test_a_check_that_cannot_begin_ends_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(HostVerifier, "begin", no_thread)
    engine = _Engine()
    words = "the worker failed in verify of bucket 0: RuntimeError"
    with _alone(verify="on") as ps, pytest.raises(UpdateError, match=words) as caught:
        ps.update("c", engine)
    assert caught.value.stage == "verify"
    assert isinstance(engine.error, WorkerUpdateError) and not engine.state.dirty


@pytest.mark.parametrize("gathers", [False, True], ids=["no gather", "a gather of nothing, as joiners do"])
def test_a_manifest_that_was_loaded_is_not_yet_agreed_on(gathers: bool) -> None:
    with _alone() as ps:
        metas = ps.get_metas()
    with ParameterServer(rank=0, world_size=1, settings=quick()) as ps:
        if gathers:
            ps.gather_metas("c")
        ps.load_metas(Manifest("c", metas.ranks))
        with pytest.raises(RuntimeError, match="call gather_metas first"):
            ps.update("c", lambda _: None)


def test_a_worker_that_reads_nothing_holds_up_nobody() -> None:
    """Its tables do not fit into the socket, so a thread of the server's is sending when the update fails elsewhere."""
    many = {f"model.layers.{i}.{'x' * 200}.weight": torch.zeros(1) for i in range(4000)}

    def ask(handles: Handles) -> None:
        channel = held.enter_context(connect(handles[0][1], 5))
        channel.send(m.Hello(1, "CPU", None, False, ()), seconds=5)
        select.select([channel], [], [], 5)  # Attach has begun to arrive
        raise ConnectionError("the engine gave up")

    with contextlib.ExitStack() as held, ParameterServer(rank=0, world_size=1, settings=quick(timeout=600.0)) as ps:
        ps.register_checkpoint("many", named_tensors=many)
        ps.gather_metas("many")
        with pytest.raises(UpdateError, match="the engine gave up"):
            ps.update("many", ask)
        assert not [t for t in threading.enumerate() if t.name in ("pass", "deliver", "collect")]
        lane = ps._keeper._lane
        assert lane is not None and not lane.damaged


def test_sockets_of_other_pid_namespaces_are_left_alone(socket_dir: Path) -> None:
    theirs = socket_dir / "999999999-0.sock"
    theirs.touch()
    with _alone() as ps:
        ps.update("c", _Engine())
    assert theirs.exists()
    theirs.unlink()


def _cannot_join(rank: int, world_size: int, crew: list[Worker]) -> Any:
    """Rank 1 cannot make its part of what they share by, once; nobody waits for it until a deadline."""

    def fails(*_: Any, **__: Any) -> Any:
        raise ManifestError("no memory for a communicator")

    with server(bucket_bytes=64 << 10, join_timeout=300.0) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                for place in ("fleet.join", "neighbours.PushCollective"):
                    patch.setattr(f"checkpoint_engine.server.{place}", fails)
            with pytest.raises(UpdateError) as caught:
                ps.update("c", request(crew[rank], rank))
        ps.update("c", request(crew[rank], rank), version="healed")
        return (caught.value.rank, caught.value.stage, str(caught.value)), crew[rank].state()[:3]


@pytest.mark.usefixtures("sharing")
def test_a_rank_that_cannot_join_the_others() -> None:
    with workers(3) as crew:
        results = run_ranks(_cannot_join, 3, crew, timeout=40)
    for (rank, stage, text), state in results:
        assert (rank, stage) == (1, "join")
        assert "no memory for a communicator" in text
        assert state == ("healed", False, digests(tensors(1)))


def _named(rank: int, world_size: int, crew: list[Worker]) -> tuple[str, bool]:
    with server(bucket_bytes=64 << 10, attach_timeout=0.3) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(UpdateError) as caught:
            ps.update("c", request(crew[rank], rank, Orders(connect=rank == 0)))
        return caught.value.host, caught.value.dirty


def test_an_error_names_the_host() -> None:
    with workers(2) as crew:
        assert run_ranks(_named, 2, crew) == [(socket.gethostname(), False)] * 2


def _fails_while_all_become_ready(rank: int, world_size: int) -> tuple[bool, bool, str | None, bool]:
    """Rank 1's request fails when its worker is all but ready, so that rank 0 decides to commit before it hears of that."""
    begun, loaded, state = threading.Event(), dict[str, torch.Tensor](), WeightsState()

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        loaded.update((name, tensor.clone()) for name, tensor in weights)

    def serve(handle: str) -> None:
        with contextlib.suppress(WorkerUpdateError):
            update_weights_from_ipc(None, handle, rank, run=load, post_hook=begun.set, state=state)

    def ask(handles: Handles) -> None:
        worker = threading.Thread(target=serve, args=(handles[rank][1],))
        worker.start()
        if rank == 1:
            begun.wait(20)
            running.append(worker)
            raise ConnectionError("the engine gave up")
        worker.join(20)

    running: list[threading.Thread] = []
    with server(bucket_bytes=64 << 10) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(UpdateError, match="the engine gave up") as caught:
            ps.update("c", ask, version="new")
        for worker in running:
            worker.join(20)
        return caught.value.committed, state.dirty, state.version, caught.value.dirty


@pytest.mark.parametrize("attempt", range(3))
def test_a_failure_while_rank_0_decides_leaves_all_workers_alike(attempt: int) -> None:
    results = run_ranks(_fails_while_all_become_ready, 3)
    assert len(set(results)) == 1, results
    assert results[0] in [(True, False, "new", False), (False, True, None, True)]


def _cancels_too_late(rank: int, world_size: int, crew: list[Worker], late: int) -> Any:
    """Rank `late` cancels when rank 0 has said that all is over, and before it hears of that itself."""
    put = Inbox.put

    def cross(inbox: Inbox, sender: int, message: object) -> None:
        if isinstance(message, m.End) and rank == late:
            ps.watch.cancel("too late")
        put(inbox, sender, message)

    with server(bucket_bytes=64 << 10) as ps, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inbox, "put", cross)
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        versions = [ps.update("c", request(crew[rank], rank), version=version).version for version in ("one", "two")]
        return versions, crew[rank].state()[:3]


@pytest.mark.parametrize("late", [0, 1])
def test_what_comes_after_the_end_ends_no_rank_otherwise(late: int) -> None:
    with workers(3) as crew:
        results = run_ranks(_cancels_too_late, 3, crew, late)
    assert results == [(["one", "two"], ("two", False, digests(tensors(1))))] * 3
