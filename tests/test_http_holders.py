"""The list of other worlds that hold what this one does: who is on it, for how long, and what a holder does to stay there."""

from __future__ import annotations

import asyncio
import json
import queue
from typing import Any

import pytest
from starlette.requests import Request

from checkpoint_engine.errors import ManifestError
from checkpoint_engine.http.announce import Announcer
from checkpoint_engine.http.holders import Holders, Lease, read_metas
from checkpoint_engine.http.problems import NotFoundError
from checkpoint_engine.manifest import Manifest, RankManifest, RegionMeta, TensorMeta
from checkpoint_engine.server.sources import Metas
from checkpoint_engine.transport.peer.base import PeerOffer, RegionOffer
from embedded_support import answering

LEASE = 30.0
SECONDS = 20.0


def world(host: str, digest: int = 7, names: tuple[str, ...] = ("a", "b"), checkpoint: str = "c") -> Metas:
    region = RegionMeta(8 * len(names), tuple(TensorMeta(n, "uint8", (8,), 8 * i, digest) for i, n in enumerate(names)))
    offer = PeerOffer(f"rank 0 ({host})", ((host, 1),), "token", "", ("tcp",), (RegionOffer(0, 1, region.nbytes),))
    return Metas(checkpoint, (RankManifest(0, host, "", (region,)),), (offer,))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def holders(clock: Clock) -> Holders:
    return Holders(LEASE, clock)


MINE = world("here")


def hosts(manifest: Manifest) -> list[str]:
    assert isinstance(manifest, Metas)
    manifest.check()
    assert [offer.name for offer in manifest.offers if offer] == [f"rank {rank.rank} ({rank.host})" for rank in manifest.ranks]
    return [rank.host for rank in manifest.ranks]


def test_a_holder_is_listed_until_its_lease_ends(holders: Holders, clock: Clock) -> None:
    assert holders.listed(MINE) is MINE
    assert holders.enter("one", world("far"), 100, MINE) == Lease(LEASE, True)
    assert holders.enter("two", world("farther", names=("b",)), 100, MINE).listed  # a part of it will do
    assert hosts(holders.listed(MINE)) == ["here", "far", "farther"]
    assert holders.listed(MINE).version == MINE.version
    clock.now += 0.9 * LEASE
    assert holders.renew("two", lambda name: MINE) == Lease(LEASE, True)
    clock.now += 0.2 * LEASE
    assert hosts(holders.listed(MINE)) == ["here", "farther"]
    with pytest.raises(NotFoundError, match="its lease has ended"):
        holders.renew("one", lambda name: MINE)
    holders.remove("two")
    holders.remove("two")
    assert holders.listed(MINE) is MINE


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (world("far", digest=8), "tensor 'a' is not the one of"),
        (world("far", digest=0), "or has no digest"),
        (world("far", names=("a", "z")), "tensor 'z' is not the one of"),
        (world("far", checkpoint="d"), "'d' is not gathered here any more"),
    ],
    ids=["other bytes", "no digests", "another tensor", "another checkpoint"],
)
def test_who_does_not_hold_the_same_is_not_listed(holders: Holders, theirs: Metas, reason: str) -> None:
    lease = holders.enter("one", theirs, 100, MINE)
    assert not lease.listed and reason in lease.reason
    assert holders.listed(MINE) is MINE


def test_who_held_the_last_one_is_not_listed_with_the_next(holders: Holders) -> None:
    assert holders.enter("one", world("far"), 100, MINE).listed
    after = world("here", digest=9)
    assert holders.listed(after) is after
    assert not holders.renew("one", lambda name: after).listed
    assert "not gathered here any more" in holders.renew("one", lambda name: None).reason
    assert holders.renew("one", lambda name: MINE).listed  # it may come back


def test_not_more_than_can_be_listed(holders: Holders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint_engine.http.holders.MOST", 1)
    holders.enter("one", world("far"), 100, MINE)
    holders.enter("one", world("farther"), 100, MINE)
    with pytest.raises(ManifestError, match="1 holders are listed already"):
        holders.enter("two", world("far"), 100, MINE)


def test_not_more_than_fits(holders: Holders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint_engine.http.holders.MOST_BYTES", 250)
    for name in ("one", "two", "one"):
        holders.enter(name, world("far"), 100, MINE)
    with pytest.raises(ManifestError, match="200 bytes already"):
        holders.enter("three", world("far"), 100, MINE)
    with pytest.raises(ManifestError, match="100 bytes already"):
        holders.enter("one", world("far"), 151, MINE)
    assert holders.enter("one", world("far"), 150, MINE).listed


def test_a_body_is_read_no_further_than_it_may_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint_engine.http.holders.LARGEST", 10)
    pieces = [b"12345", b"67890", b"1", b"never asked for"]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": len(pieces) > 0}

    with pytest.raises(ManifestError, match="longer than 10 bytes"):
        asyncio.run(read_metas(Request({"type": "http"}, receive)))
    assert pieces == [b"never asked for"]
    pieces[:] = [b"12345", b"67890"]
    assert asyncio.run(read_metas(Request({"type": "http"}, receive))) == b"1234567890"


def test_an_announcer_comes_back_and_says_what_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a server that forgot it, one that fails, and one that does not list it."""
    monkeypatch.setattr("checkpoint_engine.http.announce.RETRY_SECONDS", 0.01)
    script = [
        ("PUT", 200, {"seconds": 0.03, "listed": True, "reason": ""}),
        ("POST", 200, {"seconds": 0.03, "listed": True, "reason": ""}),
        ("POST", 404, {"error": {}}),  # it was started anew
        ("PUT", 503, {"error": {}}),
        ("PUT", 200, {"seconds": 0.03, "listed": False, "reason": "other bytes"}),
        ("POST", 200, "nonsense"),
        ("PUT", 200, {"seconds": 3600.0, "listed": True, "reason": ""}),
        ("DELETE", 200, {}),
    ]
    asked: list[tuple[str, str]] = []
    said: queue.SimpleQueue[str] = queue.SimpleQueue()

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        expected, status, words = script[len(asked)]
        asked.append((method, path))
        assert method == expected
        if method == "PUT":
            assert Metas.from_json(body) == MINE
        return status, json.dumps(words).encode()

    with answering(answer) as url, Announcer(url, None, MINE, said.put):
        heard = [said.get(timeout=SECONDS) for _ in range(5)]
    words: Any = ["later joiners are told", "answered 503", "not listed: other bytes", "cannot tell", "later joiners are told"]
    assert [word in line for word, line in zip(words, heard, strict=True)] == [True] * 5, heard
    assert [method for method, _ in asked] == [method for method, _, _ in script]
    assert len({path.removesuffix("/renew") for _, path in asked}) == 1
