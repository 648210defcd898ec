"""gather_metas: how all ranks come to the same manifest and the same plan, and how a second time costs next to nothing."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Sequence

import msgspec

from checkpoint_engine.devices.base import Device
from checkpoint_engine.errors import AgreementError, CheckpointNotFoundError
from checkpoint_engine.manifest import Manifest, RankManifest, RegionMeta, hex_digest
from checkpoint_engine.planning.buckets import plan_broadcast
from checkpoint_engine.planning.cost import CPU, H200, H200_HOST
from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.planning.sizes import Sizes, default_sizes, preferred_bucket
from checkpoint_engine.recent import Recent
from checkpoint_engine.server.fleet import Fleet
from checkpoint_engine.server.sources import Metas
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.peer.base import PeerOffer

KEPT_PLANS = 8


class Part(msgspec.Struct, frozen=True, array_like=True):
    """What each rank brings first. manifest: digest of its own; last: digest of the whole manifest it gathered last. offer: by
    which peers read it."""

    checkpoint: str
    manifest: str
    last: str
    free_bytes: int
    mem_fraction: float
    bucket_bytes: int | None
    ring_bytes: int | None
    offer: PeerOffer | None = None


def agreed_sizes(device: str, parts: Sequence[Part]) -> Sizes:
    """For all ranks alike. device: its kind."""
    return default_sizes(
        device,
        len(parts),
        min(p.free_bytes for p in parts),
        min(p.mem_fraction for p in parts),
        min((p.bucket_bytes for p in parts if p.bucket_bytes), default=None),
        min((p.ring_bytes for p in parts if p.ring_bytes), default=None),
    )


def make_plan(manifest: Manifest, sizes: Sizes, device: Device, *, one_host: bool) -> Plan:
    """one_host: ranks copy, and stage nothing."""
    on_gpus = H200_HOST if one_host else H200
    return plan_broadcast(
        manifest,
        **dataclasses.asdict(sizes),
        rates=on_gpus if device.kind == "cuda" else CPU,
        staging=0 if one_host else device.staging_slots,
    )


class Gatherer:
    """Keeps the manifests by checkpoint name, and plans by what they were made from."""

    def __init__(self, fleet: Fleet, device: Device, settings: Settings) -> None:
        self._fleet, self._device, self._settings = fleet, device, settings
        self._manifests: dict[str, Manifest] = {}
        self._sizes: dict[str, Sizes] = {}
        self._current: str | None = None
        self._last: tuple[str, tuple[RankManifest, ...]] = ("", ())
        self._plans: Recent[tuple[str, Sizes, bool], Plan] = Recent(KEPT_PLANS)

    def gather(self, name: str, regions: tuple[RegionMeta, ...], offer: PeerOffer | None = None) -> None:
        """All ranks may bring nothing: joiners do, before they load the metas that others saved."""
        mine = RankManifest(self._fleet.rank, socket.gethostname(), self._device.uuid, regions)
        parts = self._exchange_parts(self.part(name, mine.digest, offer))
        key = hex_digest(" ".join(p.manifest for p in parts).encode())
        if all(p.last == key for p in parts):
            ranks = self._last[1]
        else:
            payloads = self._exchange(f"manifest of {name!r}", mine.encoded)
            ranks = tuple(msgspec.msgpack.decode(p, type=RankManifest) for p in payloads)
            self._last = (key, ranks)
        known = self._manifests.get(name)
        # The same object where nothing changed: its digests, of tens of thousands of tensors, are made already.
        offers = tuple(p.offer for p in parts)
        if not (isinstance(known, Metas) and known.ranks is ranks and known.offers == offers):
            self._manifests[name] = Metas(name, ranks, offers)
        self._sizes[name] = agreed_sizes(self._device.kind, parts)
        self._current = name

    def part(self, name: str, digest: str, offer: PeerOffer | None = None) -> Part:
        """This rank's. digest: of what it brings."""
        settings, free = self._settings, self._device.free_bytes()
        return Part(name, digest, self._last[0], free, settings.mem_fraction, self._bucket_bytes(), settings.ring_bytes, offer)

    def _exchange_parts(self, mine: Part) -> list[Part]:
        payloads = self._exchange("gather_metas", msgspec.msgpack.encode(mine))
        parts = [msgspec.msgpack.decode(p, type=Part) for p in payloads]
        for rank, other in enumerate(parts):
            if other.checkpoint != parts[0].checkpoint:
                raise AgreementError(f"rank {rank} gathers {other.checkpoint!r}, rank 0 {parts[0].checkpoint!r}")
        return parts

    def _bucket_bytes(self) -> int | None:
        if (limit := self._settings.max_bucket_bytes) is None or self._settings.bucket_bytes is not None:
            return self._settings.bucket_bytes
        return min(limit, preferred_bucket(self._device.kind, self._fleet.world_size))

    def _exchange(self, what: str, payload: bytes) -> tuple[bytes, ...]:
        return self._fleet.links.exchange(what, payload, self._settings.join_timeout)

    def plan(self, name: str) -> tuple[Manifest, Plan]:
        """The same on all ranks. Raises CheckpointNotFoundError before `gather`."""
        if name not in self._manifests or name not in self._sizes:
            raise CheckpointNotFoundError(name, "in what gather_metas agreed on: call gather_metas first")
        manifest, sizes = self._manifests[name], self._sizes[name]
        one_host = len({rank.host for rank in manifest.ranks}) == 1  # where ranks copy, and stage nothing
        key = (manifest.layout_digest, sizes, one_host)
        return manifest, self._plans.of(key, lambda: make_plan(manifest, sizes, self._device, one_host=one_host))

    def ring_bytes(self, name: str) -> int:
        """What the ring has when no tensor needs more; 0 when nothing was gathered."""
        return self._sizes[name].ring_bytes if name in self._sizes else 0

    def manifest(self, name: str) -> Manifest:
        """As gathered or loaded. Raises CheckpointNotFoundError before that."""
        if name not in self._manifests:
            raise CheckpointNotFoundError(name, "in any metas: call gather_metas or load_metas first")
        return self._manifests[name]

    def current(self) -> Manifest:
        if self._current is None:
            raise CheckpointNotFoundError("", "in what gather_metas agreed on: nothing was gathered yet")
        return self._manifests[self._current]

    def load(self, manifest: Manifest) -> None:
        known = self._manifests.get(manifest.checkpoint)
        if known is None or known.ranks != manifest.ranks:
            self._manifests[manifest.checkpoint] = manifest
            self._sizes.pop(manifest.checkpoint, None)  # these ranks have not agreed on it
        elif isinstance(manifest, Metas):  # by other offers, perhaps
            self._manifests[manifest.checkpoint] = manifest
        self._current = manifest.checkpoint

    def forget(self, name: str) -> None:
        self._manifests.pop(name, None)
        self._sizes.pop(name, None)
        if self._current == name:
            self._current = None
