"""A receiver's connections: through all NICs, made again when a source found them idle, given up with the source."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.devices.cpu import CpuDevice
from checkpoint_engine.errors import DeviceError, ManifestError, TransferError
from checkpoint_engine.manifest import Manifest, RankManifest, RegionMeta, TensorMeta
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.planning.peers import Receiver, plan_fetch
from checkpoint_engine.server.holders import without
from checkpoint_engine.server.slots import RingSlot, Slot, Slots
from checkpoint_engine.server.sources import Metas
from checkpoint_engine.server.supply import Supply, Transports, Want, nics_of, unreadable
from checkpoint_engine.transport.peer.base import PeerOffer, PeerOptions
from checkpoint_engine.transport.peer.server import PeerServer
from checkpoint_engine.transport.peer.serving import ServerLimits
from checkpoint_engine.transport.peer.tcp import TcpLane
from helpers.peers import content

KIB = 1 << 10
NAMES = ["a", "b", "c", "d"]
GROUP = [Receiver(9, "here")]


def _metas(*offers: PeerOffer | None) -> Metas:
    """Every rank holds the same four tensors of 64 KiB."""
    region = RegionMeta(256 * KIB, tuple(TensorMeta(n, "uint8", (64 * KIB,), i * 64 * KIB) for i, n in enumerate(NAMES)))
    return Metas("c", tuple(RankManifest(r, f"far-{r}", "", (region,)) for r in range(len(offers))), offers)


def _supply(metas: Metas, slot: Slot | None = None) -> Supply:
    plan = plan_fetch(metas, [GROUP], nics_of(metas), unreadable(metas))
    kinds = {rank: "tcp" for rank, offer in enumerate(metas.offers) if offer is not None}
    slots = [slot or Slot(CpuDevice(), 256 * KIB)]
    return Supply(metas, plan, GROUP, kinds, Transports(lambda: PeerOptions(connections=1)), slots, 2.0)


def _read(supply: Supply, seconds: float = 5.0) -> bytes:
    slot = supply.slots[0]
    slot.tensor.zero_()
    supply.read([Want(name, 0, 64 * KIB, n * 64 * KIB) for n, name in enumerate(NAMES)], slot, seconds)
    return bytes(slot.tensor.numpy())


def _server(region: HostRegion, name: str, hosts: list[str]) -> PeerServer:
    server = PeerServer(name, hosts, limits=ServerLimits(idle=0.3))
    region.view(0, 256 * KIB)[:] = content(0, 256 * KIB)
    server.add(region)
    return server


def test_an_idle_connection_is_made_again_and_a_lost_source_given_up() -> None:
    with (
        HostRegion(256 * KIB) as one,
        HostRegion(256 * KIB) as two,
        _server(one, "rank 0 (x)", ["127.0.0.1", "127.0.0.2"]) as first,
        _server(two, "rank 1 (y)", ["127.0.0.1"]) as second,
        _supply(_metas(first.offer(), second.offer())) as supply,
    ):
        assert _read(supply) == content(0, 256 * KIB)
        ways = set(supply._connections)
        assert ways == {(0, 0), (0, 1), (1, 0)}  # all NICs of all sources
        time.sleep(1.0)  # longer than the sources keep a connection that is idle
        assert _read(supply) == content(0, 256 * KIB)
        assert set(supply._connections) == ways
        second.close()
        assert _read(supply) == content(0, 256 * KIB)
        assert {rank for rank, _ in supply._connections} == {0}
        first.close()
        with pytest.raises(ManifestError, match=r"rank 1 \(y\).*rank 0 \(x\).*only ranks \[0, 1\] held it"):
            _read(supply)


@pytest.mark.parametrize("kind", [Slot, RingSlot])
def test_memory_that_may_still_be_written_to_is_not_used(kind: type[Slot], monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that reads from rank 1 does not end when it should: a slot moves to other memory, the ring cannot."""
    going = threading.Event()
    take = TcpLane._take_answer

    def slow(lane: TcpLane) -> None:
        if "rank 1" in lane.owner.name:
            going.wait(20.0)
        take(lane)

    monkeypatch.setattr(TcpLane, "_take_answer", slow)
    place = torch.zeros(256 * KIB, dtype=torch.uint8)
    with (
        HostRegion(256 * KIB) as one,
        HostRegion(256 * KIB) as two,
        _server(one, "rank 0 (x)", ["127.0.0.1"]) as first,
        _server(two, "rank 1 (y)", ["127.0.0.1"]) as second,
        _supply(_metas(first.offer(), second.offer()), kind(CpuDevice(), 256 * KIB, place)) as supply,
    ):
        (slot,) = supply.slots
        if kind is RingSlot:
            with pytest.raises(TransferError, match="may still write to the ring"):
                _read(supply, 0.3)
            assert slot.quarantined
        else:
            assert _read(supply, 0.3) == content(0, 256 * KIB)
            assert slot.moved and slot.tensor is not place
        going.set()


def test_after_stop_nothing_is_read() -> None:
    with HostRegion(256 * KIB) as region, _server(region, "rank 0 (x)", ["127.0.0.1"]) as server:
        with _supply(_metas(server.offer())) as supply:
            supply.stop()
            with pytest.raises(TransferError, match="stopped"):
                _read(supply)
        server.remove(server.offer().regions[0], seconds=1)  # no lease is left


def test_an_offer_that_does_not_fit_the_manifest_is_not_read() -> None:
    with HostRegion(256 * KIB) as region, _server(region, "rank 0 (x)", ["127.0.0.1"]) as server:
        offer = server.offer()
        fitting, none = _metas(offer), _metas(None)
        assert (unreadable(fitting), unreadable(none)) == (set(), {0})
        assert unreadable(without(fitting, [0])) == {0}
        smaller = Metas("c", (RankManifest(0, "far", "", (RegionMeta(7, ()),)),), (offer,))
        assert unreadable(smaller) == {0}
        assert unreadable(Metas.from_json(Manifest("c", fitting.ranks).to_json())) == {0}  # of a server that makes no offers


@pytest.mark.parametrize("damage", ["ranks", "offers"])
def test_damaged_metas_are_refused(damage: str) -> None:
    offer = PeerOffer("rank 0 (x)", (("127.0.0.1", 1),), "token", "", ("tcp",), ())
    good = _metas(offer, offer)
    good.check()
    bad = Metas("c", good.ranks[::-1], good.offers) if damage == "ranks" else Metas("c", good.ranks, good.offers[:1])
    with pytest.raises(ManifestError, match="damaged"):
        bad.check()


def test_slots_are_all_closed_whichever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Registration(Closing):
        closed = 0

        def close(self) -> None:
            Registration.closed += 1
            if Registration.closed == 2:
                raise DeviceError("cudaHostUnregister", 700, "an illegal memory access was encountered")

    device = CpuDevice()
    monkeypatch.setattr(device, "register_host", lambda _: Registration())
    slots = Slots(device)
    before = slots.take(4, KIB)
    assert slots.take(3, KIB) == before[:3]
    slots.close()
    assert Registration.closed == 4
    assert not set(slots.take(4, KIB)) & set(before)
    slots.close()
