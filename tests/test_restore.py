"""After a failure: engines get the last committed checkpoint back, and a worker that was started anew is noticed."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from checkpoint_engine.engines import Policy
from checkpoint_engine.engines.base import EngineRequest, Handles
from checkpoint_engine.engines.sglang import SGLang
from checkpoint_engine.errors import CheckpointEngineError, EngineRefusedError, SettingsError, UpdateError
from helpers.engines import engine_processes
from helpers.fleet import LAST, Orders, Worker, digests, server, share_of, tensors, workers
from helpers.ranks import run_ranks

KIB = 1 << 10
SMALL = {"bucket_bytes": 64 * KIB}


class Asks:
    """A req_func that gives its worker other orders each time that it is called."""

    def __init__(self, worker: Worker, rank: int, *orders: Orders) -> None:
        self.worker, self.rank, self.orders = worker, rank, list(orders)

    def __call__(self, handles: Handles) -> None:
        self.worker.update(handles[self.rank][1], self.orders.pop(0) if self.orders else Orders())


def _failed(ps: Any, ask: Asks, **options: Any) -> UpdateError:
    with pytest.raises(UpdateError) as caught:
        ps.update(options.pop("name", "new"), ask, version="new", **options)
    return caught.value


def _restores(rank: int, world_size: int, crew: list[Worker], orders: Orders) -> Any:
    bad = orders if rank == world_size - 1 else Orders()
    with server(**SMALL) as ps:
        for seed, name in enumerate(["old", "new"]):
            ps.register_checkpoint(name, named_tensors=share_of(tensors(seed), rank, world_size))
            ps.gather_metas(name)
        first = _failed(ps, Asks(crew[rank], rank, bad), on_failure="restore")
        ps.update("old", Asks(crew[rank], rank), version="old")
        ask = Asks(crew[rank], rank, bad)
        second = _failed(ps, ask, on_failure="restore")
        state = crew[rank].state()[:3]
        left_alone = _failed(ps, Asks(crew[rank], rank, bad))
        ps.unregister_checkpoint("old")
        third = _failed(ps, Asks(crew[rank], rank, bad), on_failure="restore")
        ps.update("new", Asks(crew[rank], rank), version="new")
        return [(str(e), e.dirty, e.restored) for e in (first, second, left_alone, third)], state, crew[rank].state()[:3]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("orders", [Orders(raise_in_bucket=2), Orders(raise_in_post_hook=True)], ids=["load", "post_hook"])
def test_the_last_committed_checkpoint_is_put_back(world_size: int, orders: Orders) -> None:
    with workers(world_size) as crew:
        results = run_ranks(_restores, world_size, crew, orders)
    for (first, second, left_alone, third), restored, healed in results:
        assert first[0].endswith("; not restored: rank 0: no update has succeeded here before")
        assert second[0].endswith("; 'old' was restored")
        assert second[1:] == (False, "old")
        assert restored == ("old", False, digests(tensors(0)))
        assert left_alone[2] is None and "restored" not in left_alone[0]
        assert "; not restored: rank 0: checkpoint 'old' is not registered" in third[0]
        assert (first[1], left_alone[1], third[1]) == (True, True, True)
        assert healed == ("new", False, digests(tensors(1)))
    assert len({tuple(texts) for texts, _, _ in results}) == 1, "the ranks disagree"


def _fails_while_restoring(rank: int, world_size: int, crew: list[Worker]) -> Any:
    with server(**SMALL) as ps:
        for seed, name in enumerate(["old", "new"]):
            ps.register_checkpoint(name, named_tensors=share_of(tensors(seed), rank, world_size))
            ps.gather_metas(name)
        ps.update("old", Asks(crew[rank], rank), version="old")
        bad = [Orders(raise_in_bucket=0), Orders(raise_in_bucket=1)] if rank == 1 else []
        error = _failed(ps, Asks(crew[rank], rank, *bad), on_failure="restore")
        untouched = _failed(ps, Asks(crew[rank], rank, Orders(connect=False)), name="old", on_failure="restore")
        return str(error), error.dirty, crew[rank].state()[1], untouched.aftermath, untouched.restored


def test_restoring_may_fail_too() -> None:
    with workers(2) as crew:
        results = run_ranks(_fails_while_restoring, 2, crew)
    for text, said_dirty, is_dirty, _, _ in results:
        assert "not restored: Failed to update weights due to remote errors: rank 1" in text
        assert said_dirty and is_dirty


def _nothing_was_loaded(rank: int, world_size: int, crew: list[Worker]) -> Any:
    with server(**SMALL, attach_timeout=0.3) as ps:
        ps.register_checkpoint("new", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("new")
        error = _failed(ps, Asks(crew[rank], rank, Orders(connect=rank == 0)), on_failure="restore")
        return error.aftermath, error.dirty, crew[rank].state()[:2]


def test_engines_that_loaded_nothing_are_left_alone() -> None:
    with workers(2) as crew:
        assert run_ranks(_nothing_was_loaded, 2, crew) == [("", False, (None, False))] * 2


def _was_a_mixture(rank: int, world_size: int, crew: list[Worker]) -> Any:
    """An update leaves mixtures; the next one fails before it loads anything, for the worker of rank 1 does not come."""
    with server(**SMALL, attach_timeout=2.0) as ps:
        for seed, name in enumerate(["old", "new"]):
            ps.register_checkpoint(name, named_tensors=share_of(tensors(seed), rank, world_size))
            ps.gather_metas(name)
        ps.update("old", Asks(crew[rank], rank), version="old")
        _failed(ps, Asks(crew[rank], rank, Orders(raise_in_bucket=LAST)))
        again = _failed(ps, Asks(crew[rank], rank, Orders(connect=rank == 0)))
        error = _failed(ps, Asks(crew[rank], rank, Orders(connect=rank == 0)), on_failure="restore")
        return again.dirty, error.stage, error.restored, error.dirty, crew[rank].state()[:3]


def test_a_mixture_of_an_earlier_update_is_put_back_too() -> None:
    with workers(2) as crew:
        results = run_ranks(_was_a_mixture, 2, crew)
    whole = ("attach", "old", False, ("old", False, digests(tensors(0))))
    assert results == [(True, *whole), (False, *whole)]  # rank 1 has not heard from its worker


def _declared(rank: int, world_size: int, crew: list[Worker]) -> Any:
    """The server is new, and is told what the engines serve."""
    with server(**SMALL) as ps:
        for seed, name in enumerate(["old", "new"]):
            ps.register_checkpoint(name, named_tensors=share_of(tensors(seed), rank, world_size))
            ps.gather_metas(name)
        ps.declare_served("old", "v1")
        error = _failed(ps, Asks(crew[rank], rank, Orders(raise_in_bucket=LAST)), on_failure="restore")
        with pytest.raises(SettingsError, match="cannot be combined with ranks"):
            ps.update("new", Asks(crew[rank], rank), ranks=[0], on_failure="restore")
        with pytest.raises(SettingsError, match="abort or restore, not 'undo'"):
            ps.update("new", Asks(crew[rank], rank), on_failure="undo")
        return error.restored, crew[rank].state()[:3]


def test_a_new_server_is_told_what_is_served() -> None:
    with workers(2) as crew:
        assert run_ranks(_declared, 2, crew) == [("v1", ("v1", False, digests(tensors(0))))] * 2


def test_a_request_says_the_version_that_is_put_back() -> None:
    request = EngineRequest(None, 0, 1, "new", 1.0)
    assert request.of("old").version == "old"
    assert EngineRequest(None, 0, 1, None, 1.0).of("old").version is None  # engines that were never told one are not now


# --- workers that were started anew ----------------------------------------------------------------------------------------


def _restarted(rank: int, world_size: int, crew: list[Worker]) -> Any:
    with server(**SMALL) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        first = ps.update("c", Asks(crew[rank], rank), version="v1")
        again = ps.update("c", Asks(crew[rank], rank), version="v2")
        spare = crew[rank + world_size] if rank == 1 else crew[rank]
        with pytest.raises(UpdateError) as caught:
            ps.update("c", Asks(spare, rank, Orders(raise_in_bucket=0)), version="v3")
        third = ps.update("c", Asks(spare, rank), version="v3")
        fourth = ps.update("c", Asks(spare, rank), version="v4")
        return first.notes, again.notes, getattr(caught.value, "__notes__", []), third.notes, fourth.notes


def test_a_worker_that_was_started_anew_is_named() -> None:
    with workers(4) as crew:
        results = run_ranks(_restarted, 2, crew)
    words = f"rank 1: the worker on {socket.gethostname()} was started anew: pid "
    for rank, (first, again, failed, third, fourth) in enumerate(results):
        assert first == again == fourth == ()
        assert len(failed) == rank  # each rank's error names its own worker
        for note in (*failed, *third):
            assert note.startswith(words)
            assert " serves no version, in place of pid " in note
            assert note.endswith(", which served 'v2'")
        assert len(third) == 1


# --- rollouts --------------------------------------------------------------------------------------------------------------

RANKS, SECONDS = 2, 20.0
SPOILT = "encoder.layer.1.output.dense.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from embedded_support import save_bert

    return [save_bert(tmp_path_factory.mktemp(f"bert-{seed}"), seed) for seed in range(3)]


def _pushes(rank: int, world_size: int, urls: list[str], bad: str, files: list[str]) -> Any:
    from safetensors.torch import load_file

    def push(number: int, version: str, spoil: bool = False, clients: list[SGLang] | None = None, **policy: Any) -> Any:
        mine = dict(list(load_file(files[number]).items())[rank::RANKS])
        if spoil and SPOILT in mine:
            mine[SPOILT] = mine[SPOILT][:3].clone()
        options = Policy(pause="keep", **policy)
        try:
            result = ps.push(mine, engines=clients or engines, version=version, policy=options).version
        except CheckpointEngineError as e:
            result = str(e), getattr(e, "restored", None), getattr(e, "__notes__", [])
        ps.store_based_barrier()  # each rank resumes its own engine
        own = engines[rank]
        paused = own.request("GET", "/is_paused", None, SECONDS).json()["is_paused"]
        try:
            answer: Any = own.request("POST", "/embed", {"input": ["the cat sat"]}, 2.0).json()["version"]
        except EngineRefusedError as e:
            answer = e.status
        except CheckpointEngineError:
            answer = "waits"
        seen.append((result, own.weights(), paused, answer))
        ps.store_based_barrier()

    seen: list[Any] = []
    with server(bucket_bytes=4096) as ps, ExitStack() as stack:
        engines = [stack.enter_context(SGLang(url)) for url in urls]
        push(0, "a", on_failure="restore")
        push(1, "b", spoil=True, on_failure="restore")
        push(1, "c", on_failure="restore")
        push(2, "d", spoil=True, on_failure="restore")
        # The second engine loads nothing of the next one, nor of what is put back: the other one gets it all the same.
        broken = [engines[0], stack.enter_context(SGLang(bad))]
        push(2, "e", spoil=True, clients=broken, on_failure="restore")
        push(2, "f", spoil=True)
        push(2, "g")
        names = ps._registry.names()
    return seen, names


def test_engines_that_are_pushed_to_get_the_last_push_back(models: list[Path]) -> None:
    from embedded_support import answering

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if method == "GET":
            return 404, b""
        return (500, b"no memory") if path == "/update_weights_from_ipc" else (200, b'{"success": true}')

    with engine_processes(models[0], [[]] * RANKS) as urls, answering(answer) as bad:
        results = run_ranks(_pushes, RANKS, urls, bad, [str(m / "model.safetensors") for m in models])
    for rank, ((a, b, c, d, e, f, g), names) in enumerate(results):
        assert (a[0], a[1].version, a[2:]) == ("a", "a", (False, "a"))
        assert SPOILT in b[0][0] and b[0][0].endswith("; 'a' was restored")
        assert b[0][1:] == ("a", [])
        assert (b[1].version, b[1].dirty, b[2:]) == ("a", False, (False, "a"))
        assert (c[0], c[1].version, c[3]) == ("c", "c", "c")
        assert d[0][1] == "c" and d[1:] == (c[1], False, "c")
        assert "rank 1" in e[0][0] and "no memory" in e[0][0]
        assert e[1].version == "c" and e[3] == "c"
        assert f[0][1] is None and "restored" not in f[0][0]
        assert (f[1].dirty, f[2:]) == (True, (True, "waits"))
        assert f[0][2] == [f"engine at {urls[rank]} stays paused: its weights are a mixture until the next complete update"]
        assert (g[0], g[1].version, g[3]) == ("g", "g", "g")
        assert names == ("push",)
