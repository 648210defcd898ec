"""A world that follows another one on the same port: its ranks may find the store of the one before, and look again."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpoint_engine.devices.polling import poll
from checkpoint_engine.errors import PeerLostError
from checkpoint_engine.server.fleet import Fleet
from checkpoint_engine.settings import Settings
from helpers.ports import free_ports

SETTINGS = Settings(join_timeout=20.0, device="cpu")
SECONDS = 30.0
BOTH = (b"0", b"1")


def _fleet(rank: int, port: int) -> Fleet:
    return Fleet(rank, 2, SETTINGS, "127.0.0.1", port)


def _meet(fleet: Fleet) -> tuple[bytes, ...]:
    return fleet.links.exchange("hello", str(fleet.rank).encode(), SECONDS)


@pytest.mark.parametrize("met", [True, False])
def test_a_rank_that_finds_the_store_of_the_world_before(met: bool) -> None:
    """met: that world's ranks had told the store where they are; else it never came so far."""
    port = free_ports(2)
    with ThreadPoolExecutor(2) as threads, contextlib.ExitStack() as stack:
        old = stack.enter_context(_fleet(0, port))
        assert old.store is not None
        if met:
            with _fleet(1, port) as other:
                assert [each.result(SECONDS) for each in [threads.submit(_meet, fleet) for fleet in (old, other)]] == [BOTH] * 2
        late = stack.enter_context(_fleet(1, port))
        second = threads.submit(_meet, late)
        assert poll(lambda: late._store is not None, SECONDS)
        assert not second.done()  # whether it has asked that store by now, or finds it closed
        old.close()
        new = stack.enter_context(_fleet(0, port))
        assert [threads.submit(_meet, new).result(SECONDS), second.result(SECONDS)] == [BOTH] * 2


def test_a_rank_whose_peer_is_gone_does_not_look_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint_engine.server.fleet.LOOK_AGAIN_SECONDS", 0.5)
    port = free_ports(2)
    with ThreadPoolExecutor(2) as threads, _fleet(0, port) as old, _fleet(1, port) as late:
        with _fleet(1, port) as other:
            for each in [threads.submit(_meet, fleet) for fleet in (old, other)]:
                each.result(SECONDS)
        start = time.monotonic()
        with pytest.raises(PeerLostError, match="rank 0"):
            _meet(late)
        assert time.monotonic() - start < SETTINGS.join_timeout
