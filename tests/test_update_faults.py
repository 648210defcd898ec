"""What goes wrong in an update ends on every rank with a named error, and the next complete update heals it."""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch

from checkpoint_engine.errors import UpdateError, UpdateInProgressError
from checkpoint_engine.server import ParameterServer
from checkpoint_engine.transport.channel import MAGIC, PREAMBLE
from checkpoint_engine.transport.messages import PROTOCOL
from checkpoint_engine.transport.session import prepare_directory
from helpers.fleet import LAST, Handles, Orders, Worker, digests, quick, request, server, share_of, tensors, workers
from helpers.ranks import run_ranks, start_ranks

pytestmark = pytest.mark.usefixtures("sharing")
KIB = 1 << 10
SMALL = {"bucket_bytes": 64 * KIB}


def _fail_then_heal(rank: int, world_size: int, crew: list[Worker], orders: Orders, settings: dict[str, Any]) -> Any:
    """The last rank's worker misbehaves once; then everything works, on the same communicator."""
    mine = orders if rank == world_size - 1 else Orders()
    with server(**settings) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        try:
            ps.update("c", request(crew[rank], rank, mine))
            error = None
        except UpdateError as e:
            error = e
        after_failure = crew[rank].state()
        group = ps._keeper.collective
        ps.update("c", request(crew[rank], rank), version="healed")
        kept = ps._keeper.collective is group
        return str(error), error and (error.rank, error.stage, error.dirty), after_failure, crew[rank].state(), kept


def _check_healed(results: list[Any], rank: int, stage: str, words: str) -> None:
    texts = {text for text, _, _, _, _ in results}
    assert len(texts) == 1, f"the ranks disagree: {texts}"
    text = texts.pop()
    assert text.startswith("Failed to update weights due to remote errors: ")
    assert words in text
    for _, (failed_rank, failed_stage, _), _, (version, dirty, params, _), kept in results:
        assert (failed_rank, failed_stage) == (rank, stage)
        assert (version, dirty) == ("healed", False)
        assert params == digests(tensors(1))
        assert kept, "the communicator was not kept"


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("bucket", [0, 3, LAST])
def test_load_weights_raises(world_size: int, bucket: int) -> None:
    with workers(world_size) as crew:
        results = run_ranks(_fail_then_heal, world_size, crew, Orders(raise_in_bucket=bucket), SMALL)
    _check_healed(results, world_size - 1, "load", ": ValueError: no room for model.layers")
    assert results[-1][2][:2] == (None, True)
    assert len(results[-1][2][3]) == (bucket + 1 if bucket != LAST else len(results[-1][3][3]))
    assert len(results[-1][3][3]) > 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_load_weights_raises_in_the_only_bucket(world_size: int) -> None:
    with workers(world_size) as crew:
        results = run_ranks(_fail_then_heal, world_size, crew, Orders(raise_in_bucket=LAST), {"bucket_bytes": 64 << 20})
    _check_healed(results, world_size - 1, "load", ": ValueError: no room for")


@pytest.mark.parametrize("world_size", [1, 3])
def test_post_hook_raises(world_size: int) -> None:
    with workers(world_size) as crew:
        results = run_ranks(_fail_then_heal, world_size, crew, Orders(raise_in_post_hook=True), SMALL)
    _check_healed(results, world_size - 1, "post_hook", "ValueError: post-processing went wrong")
    assert all(state[:2] == (None, True) for _, _, state, _, _ in results)


def test_an_engine_that_never_connects() -> None:
    with workers(2) as crew:
        results = run_ranks(_fail_then_heal, 2, crew, Orders(connect=False), {**SMALL, "attach_timeout": 0.5})
    _check_healed(results, 1, "attach", "gave up after 0.5 s waiting for the workers of ranks [1] to connect")
    assert all(state[:2] == (None, False) for _, _, state, _, _ in results), "no byte was loaded"


def _request_raises(rank: int, world_size: int, crew: list[Worker]) -> Any:
    def ask(handles: Handles) -> None:
        if rank == 1:
            raise ConnectionError("engine at http://nowhere: no answer")
        crew[rank].update(handles[rank][1])

    with server(**SMALL) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(UpdateError, match=r"rank 1 .* stage request: ConnectionError: engine at http://nowhere: no answer"):
            ps.update("c", ask)
        assert crew[rank].state()[:2] == (None, False)
        ps.update("c", request(crew[rank], rank), version="healed")
        return crew[rank].state()[:2]


def test_an_engine_that_cannot_be_reached() -> None:
    with workers(2) as crew:
        assert run_ranks(_request_raises, 2, crew) == [("healed", False)] * 2


def _worker_dies(rank: int, world_size: int, crew: list[Worker], orders: Orders) -> str:
    def ask(handles: Handles) -> None:
        crew[rank].update(handles[rank][1], orders if rank == 0 else Orders())

    with server(**SMALL) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(UpdateError) as caught:
            ps.update("c", ask)
        spare = crew[world_size + rank]  # the engine was started again
        ps.update("c", request(spare, rank), version="healed")
        assert spare.state()[:3] == ("healed", False, digests(tensors(1)))
    return str(caught.value)


@pytest.mark.parametrize("orders", [Orders(die_in_bucket=0), Orders(die_in_bucket=LAST), Orders(die_in_post_hook=True)])
def test_a_worker_is_killed(orders: Orders) -> None:
    with workers(4) as crew:
        texts = run_ranks(_worker_dies, 2, crew, orders)
    assert all("rank 0" in text and "is gone" in text and "worker of rank 0 (pid " in text for text in texts), texts


def _worker_stops(rank: int, world_size: int, crew: list[Worker]) -> str:
    with server(**SMALL, timeout=2.0) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(UpdateError) as caught:
            ps.update("c", request(crew[rank], rank, Orders(stop_in_bucket=2 if rank == 0 else None)))
    return str(caught.value)


def test_a_worker_that_stands_still_ends_by_the_deadline() -> None:
    with workers(2) as crew:
        texts = run_ranks(_worker_stops, 2, crew)
    assert all("rank 0" in text and "gave up after 2 s waiting for" in text and "bucket 2" in text for text in texts), texts


def _server_dies(rank: int, world_size: int, crew: list[Worker], victim: int) -> str | None:
    def ask(handles: Handles) -> None:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        crew[rank].update(handles[rank][1])

    with server(**SMALL) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(UpdateError) as caught:
            ps.update("c", ask)
        return str(caught.value)


def _sweep() -> None:
    """What the killed server left behind goes when the next one comes."""
    settings = quick()
    assert list(settings.socket_dir.iterdir())
    prepare_directory(settings)
    assert not list(settings.socket_dir.iterdir())


@pytest.mark.parametrize("victim", [0, 2])
def test_a_server_is_killed(victim: int) -> None:
    with workers(3) as crew, start_ranks(_server_dies, 3, crew, victim, may_die=[victim]) as ranks:
        texts = ranks.results(20)
        states = [crew[r].state()[:2] for r in range(3) if r != victim]
    _sweep()
    assert all(text is None if rank == victim else f"rank {victim}" in text for rank, text in enumerate(texts)), texts
    assert states == [(None, False)] * 2


def _server_dies_in_mid_stream(rank: int, world_size: int, crew: list[Worker]) -> str:
    """Rank 1 is killed while buckets are on their way."""
    seen = 0

    def killer(nbytes: int) -> None:
        nonlocal seen
        seen += nbytes
        if rank == 1 and seen > 256 * KIB:
            os.kill(os.getpid(), signal.SIGKILL)

    with server(**SMALL, ring_bytes=64 * KIB) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(UpdateError) as caught:
            ps.update("c", request(crew[rank], rank), progress=killer)
        return str(caught.value)


def test_a_server_is_killed_in_mid_stream() -> None:
    with workers(3) as crew, start_ranks(_server_dies_in_mid_stream, 3, crew, may_die=[1]) as ranks:
        texts = ranks.results(30)
        states = [crew[r].state() for r in (0, 2)]
    _sweep()
    assert "rank 1" in texts[0] and "rank 1" in texts[2], texts
    # Where each rank copies for itself, one may have loaded nothing by then, and is clean.
    assert all(version is None and (dirty or not calls) for version, dirty, _, calls in states), states


def _two_at_once(rank: int, world_size: int, crew: list[Worker]) -> Any:
    refused: list[str] = []

    def ask(handles: Handles) -> None:
        with pytest.raises(UpdateInProgressError) as caught:
            ps.update("c", lambda _: None)
        refused.append(str(caught.value))
        crew[rank].update(handles[rank][1])

    with server() as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        ps.update("c", ask)
        return refused, crew[rank].state()[1]


def test_two_updates_at_once() -> None:
    with workers(2) as crew:
        assert run_ranks(_two_at_once, 2, crew) == [
            ([f"rank {r} is updating already; one update at a time"], False) for r in (0, 1)
        ]


def _unix(handle: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(handle.removeprefix("ipc://"))
    return sock


def _another_version(sock: socket.socket) -> None:
    sock.sendall(PREAMBLE.pack(MAGIC, 99))


def _garbage(sock: socket.socket) -> None:
    sock.sendall(b"GET / HTTP/1.1\r\n\r\n")


def _garbage_after_the_preamble(sock: socket.socket) -> None:
    sock.sendall(PREAMBLE.pack(MAGIC, PROTOCOL) + struct.pack("<I", 5) + b"\xff" * 5)


def _too_long(sock: socket.socket) -> None:
    sock.sendall(PREAMBLE.pack(MAGIC, PROTOCOL) + struct.pack("<I", 0xFFFFFFFF))


def _a_word_out_of_turn(sock: socket.socket) -> None:
    sock.sendall(PREAMBLE.pack(MAGIC, PROTOCOL) + struct.pack("<I", 9) + b"\x92\xa5Ready\x00\x00")


def _hang_up(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_RDWR)


def _stranger(rank: int, world_size: int, crew: list[Worker], speak: Callable[[socket.socket], None]) -> str:
    def ask(handles: Handles) -> None:
        if rank == 1:
            with _unix(handles[1][1]) as sock:
                speak(sock)
                while sock.recv(100):
                    pass
        else:
            crew[rank].update(handles[rank][1])

    with server(**SMALL) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(UpdateError) as caught:
            ps.update("c", ask)
        assert crew[rank].state()[:2] == (None, False)
        ps.update("c", request(crew[rank], rank))
        assert not crew[rank].state()[1]
    return str(caught.value)


@pytest.mark.parametrize(
    ("speak", "words"),
    [
        (_another_version, f"speaks protocol version 99, not {PROTOCOL}"),
        (_garbage, "does not speak this protocol"),
        (_garbage_after_the_preamble, "sent something that is not a message"),
        (_too_long, "announced a message of 4294967295 bytes"),
        (_a_word_out_of_turn, "sent something that is not a message"),
        (_hang_up, "is gone"),
    ],
)
def test_a_stranger_on_the_socket(speak: Callable[[socket.socket], None], words: str) -> None:
    with workers(2) as crew:
        texts = run_ranks(_stranger, 2, crew, speak)
    assert all(words in text and "rank 1" in text and "stage attach" in text for text in texts), texts


def _names(rank: int, world_size: int, crew: list[Worker]) -> list[str]:
    """Misuse: each a typed error, and what is registered stays as it is."""
    said = []

    def wrong(action: Callable[[], object]) -> None:
        with pytest.raises(RuntimeError) as caught:
            action()
        said.append(f"{type(caught.value).__name__}: {caught.value}")

    with server(**SMALL) as ps:
        wrong(lambda: ps.update("nothing", lambda _: None))
        ps.gather_metas("nothing")  # joiners hold nothing and gather
        wrong(lambda: ps.update("nothing", lambda _: None))
        wrong(lambda: ps.unregister_checkpoint("nothing"))
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        wrong(lambda: ps.register_checkpoint("c", named_tensors={"a": torch.ones(1)}))
        wrong(lambda: ps.update("c", lambda _: None))
        ps.gather_metas("c")
        wrong(lambda: ps.update("c", lambda _: None, ranks=[99]))
        ps.update("c", request(crew[rank], rank))
        assert crew[rank].state()[2] == digests(tensors(1))
    return said


@pytest.mark.parametrize("world_size", [1, 2])
def test_misuse(world_size: int) -> None:
    with workers(world_size) as crew:
        for said in run_ranks(_names, world_size, crew):
            kinds = [line.split(":")[0] for line in said]
            named = "CheckpointNotFoundError" if world_size == 1 else "AgreementError"
            assert kinds == [
                named, named, "CheckpointNotFoundError", "CheckpointExistsError", named, "SettingsError",
            ]  # fmt: skip
            assert "call gather_metas first" in said[0]
            assert "'nothing' is not registered on any rank" in said[1]


def _one_rank_lacks_it(rank: int, world_size: int) -> str:
    with server(**SMALL) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        if rank == 1:
            ps.unregister_checkpoint("c")
        with pytest.raises(RuntimeError) as caught:
            ps.update("c", lambda _: None)
        return str(caught.value)


def test_a_rank_that_cannot_take_part_is_named_everywhere() -> None:
    texts = run_ranks(_one_rank_lacks_it, 2)
    assert all("cannot take part in the update: CheckpointNotFoundError" in text and "rank 1 (" in text for text in texts), texts


def _absent(rank: int, world_size: int) -> str:
    with server(join_timeout=1.0) as ps:
        ps.store_based_barrier()
        if rank == 1:
            return ""
        with pytest.raises(RuntimeError) as caught:
            ps.gather_metas("c")
        return str(caught.value)


def test_a_rank_that_left_is_named() -> None:
    assert "rank 1 is gone (it left in good order)" in run_ranks(_absent, 2)[0]


def _different_calls(rank: int, world_size: int) -> str:
    with server() as ps:
        with pytest.raises(RuntimeError) as caught:
            ps.gather_metas("c") if rank else ps.store_based_barrier()
        ps.store_based_barrier()  # and all are in step again
        return str(caught.value)


def test_ranks_that_call_different_things() -> None:
    assert all("rank 1 is at gather_metas, rank 0 at barrier" in text for text in run_ranks(_different_calls, 2))


def test_a_server_needs_to_know_who_it_is() -> None:
    with pytest.raises(RuntimeError, match="set RANK"):
        ParameterServer(world_size=1)
    with pytest.raises(RuntimeError, match="rank 3 is not in a world of 2"):
        ParameterServer(rank=3, world_size=2)
    with ParameterServer(rank=0, world_size=1) as ps:  # 0 is a rank
        assert ps.rank == 0
