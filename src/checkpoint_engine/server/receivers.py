"""Updates of some ranks only, which read from peers what they need: who takes part, what each reads, and the update itself."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from checkpoint_engine.devices.base import Closing, Device
from checkpoint_engine.errors import AgreementError, CheckpointEngineError, SettingsError, UpdateError
from checkpoint_engine.manifest import hex_digest
from checkpoint_engine.memory.registry import Registry
from checkpoint_engine.planning.peers import Receiver, as_manifest, plan_fetch
from checkpoint_engine.server.bids import Agreed, Bid, crossing, kind_of, renumbered
from checkpoint_engine.server.fetch import READERS, Feed, FetchPass
from checkpoint_engine.server.fleet import Fleet, SubFleet
from checkpoint_engine.server.gather import Gatherer, agreed_sizes, make_plan
from checkpoint_engine.server.keeper import Keeper
from checkpoint_engine.server.landing import Landing
from checkpoint_engine.server.pipeline import Pass
from checkpoint_engine.server.report import UpdateReport
from checkpoint_engine.server.request import RequestFunction
from checkpoint_engine.server.served import Served
from checkpoint_engine.server.slots import Slot, Slots
from checkpoint_engine.server.sources import Metas, Sources, peer_options
from checkpoint_engine.server.supply import Supply, Transports, nics_of, unreadable
from checkpoint_engine.server.updater import Prepared, Updater
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.descriptors import whereabouts
from checkpoint_engine.transport.links import Links

SLOTS = READERS
"""Pieces that a rank reads ahead of lifting them, where they do not stay."""


class Receivers(Closing):
    """Runs updates with `ranks`, and keeps transports, and what each such set of ranks shares: links, lane, communicator."""

    def __init__(
        self,
        fleet: Fleet,
        device: Device,
        keeper: Keeper,
        gatherer: Gatherer,
        registry: Registry,
        served: Served,
        sources: Sources,
        settings: Settings,
        begins: Callable[[Links], None],
    ) -> None:
        """begins: called when all agree, with the links over which the update runs from their next round on."""
        self._fleet, self._device, self._settings = fleet, device, settings
        self._owned = contextlib.ExitStack()
        transports = self._owned.enter_context(Transports(lambda: peer_options(settings, sources.address)))
        slots = self._owned.enter_context(Slots(device))  # closed before the transports that know them
        self._parts = (gatherer, registry, served, sources, transports, slots, begins)
        everybody = tuple(range(fleet.world_size))
        self._updaters = {everybody: FetchUpdater(fleet, device, keeper, *self._parts, everybody)}

    def update(
        self,
        name: str,
        req_func: RequestFunction,
        settings: Settings,
        version: str | None,
        progress: Callable[[int], None] | None,
        ranks: Sequence[int],
        keep: bool,
    ) -> UpdateReport:
        """See ParameterServer.update. On a rank that is not in `ranks`: nothing, and an empty report."""
        chosen, world_size = tuple(sorted(set(ranks))), self._fleet.world_size
        if not all(isinstance(rank, int) and 0 <= rank < world_size for rank in chosen):
            raise SettingsError(f"ranks {list(ranks)} are not all in a world of {world_size}")
        if self._fleet.rank not in chosen:
            return UpdateReport(version or "", "none", 0, 0.0, 0, {}, ())
        if chosen not in self._updaters:
            fleet = self._owned.enter_context(SubFleet(self._fleet, chosen, self._settings))
            keeper = self._owned.enter_context(Keeper(fleet, self._device))
            self._updaters[chosen] = FetchUpdater(fleet, self._device, keeper, *self._parts, chosen)

        def ask(handles: list[tuple[str, str]]) -> object:
            places = dict(zip(chosen, handles, strict=True))
            return req_func([places.get(rank, ("", "")) for rank in range(world_size)])

        try:
            return self._updaters[chosen].fetch(name, ask, settings, version, progress, keep)
        except UpdateError as e:  # by its rank in the world
            rank, found = chosen[e.rank], e
        raise found.but(rank=rank) from found

    def close(self) -> None:
        self._owned.close()
        self._updaters.clear()


class FetchUpdater(Updater):
    """Updates all ranks of `fleet` with what they read from the sources that the metas name."""

    def __init__(
        self,
        fleet: Fleet,
        device: Device,
        keeper: Keeper,
        gatherer: Gatherer,
        registry: Registry,
        served: Served,
        sources: Sources,
        transports: Transports,
        slots: Slots,
        begins: Callable[[Links], None],
        ranks: Sequence[int],
    ) -> None:
        """ranks: of the receivers in their world, for messages."""
        super().__init__(fleet, device, keeper, gatherer, registry, served)
        self._sources, self._transports, self._slots, self._begins = sources, transports, slots, begins
        self._ranks = ranks
        self._agreed: Agreed | None = None
        self._keeping = False
        self._landing: tuple[Landing, tuple[Slot, ...]] | None = None
        self._book = None

    def fetch(
        self,
        name: str,
        req_func: RequestFunction,
        settings: Settings,
        version: str | None,
        progress: Callable[[int], None] | None,
        keep: bool,
    ) -> UpdateReport:
        """Collective of the receivers. Raises as Updater.update, and ManifestError when nobody offers what is needed.

        keep: what this rank reads stays, as its part of the checkpoint.
        """
        settings = settings.replace(method="broadcast", sparse="off")  # a FetchPass reads what all of its stream needs
        self._agreed = agreed = self._agree(name, settings)
        self._keeping = keep
        self._begins(self._fleet.links)
        try:
            report = self.update(name, req_func, settings, version, progress)
            if self._landing is not None:
                landing, slots = self._landing
                landing.keep(slots)
        except BaseException:
            self._slots.close()  # with whatever may still be written there
            raise
        finally:
            if self._landing is not None:
                self._landing[0].close()
            self._agreed = self._landing = None
            self._make_pass = Pass  # the other one would keep what the reads went to
        return dataclasses.replace(report, method=f"p2p ({agreed.by})" if agreed.by else "p2p")

    # --- agreement -----------------------------------------------------------------------------------------------------

    def _bid(self, name: str, settings: Settings) -> tuple[Metas | None, Bid]:
        host, where = socket.gethostname(), whereabouts()
        try:
            metas = self._gatherer.manifest(name)
            if not isinstance(metas, Metas):
                metas = Metas(metas.checkpoint, metas.ranks)
            metas.check()
            part = self._gatherer.part(name, hex_digest(msgspec.msgpack.encode(metas)))
            token = self._sources.token
            here = [n for n, offer in enumerate(metas.offers) if offer is not None and offer.token == token]
            return metas, Bid(part, host, where, settings.peer_transport, here[0] if here else -1)
        except CheckpointEngineError as e:  # the others must not wait for this rank
            if self._fleet.world_size == 1:
                raise
            return None, Bid(self._gatherer.part(name, ""), host, where, settings.peer_transport, error=str(e))

    def _agree(self, name: str, settings: Settings) -> Agreed:
        metas, mine = self._bid(name, settings)
        payloads = self._fleet.links.exchange("update of some ranks", msgspec.msgpack.encode(mine), settings.join_timeout)
        bids = [msgspec.msgpack.decode(payload, type=Bid) for payload in payloads]
        for rank, bid in zip(self._ranks, bids, strict=True):
            if bid.error:
                raise AgreementError(f"receiver {rank} ({bid.host}) cannot take part in the update: {bid.error}")
            if (bid.part.checkpoint, bid.part.manifest) != (bids[0].part.checkpoint, bids[0].part.manifest):
                raise AgreementError(
                    f"receivers {self._ranks[0]} and {rank} ({bid.host}) want other checkpoints, or loaded other metas"
                )
        if metas is None:
            raise AgreementError("this rank has no metas")
        # Receivers that the manifest does not know have numbers behind its ranks.
        group = tuple(Receiver(b.source if b.source >= 0 else metas.world_size + n, b.host) for n, b in enumerate(bids))
        reads = plan_fetch(metas, [group], nics_of(metas), unreadable(metas))
        derived, sources = as_manifest(reads.groups[0], metas)
        stream = renumbered(derived, group)
        sizes = agreed_sizes(self._device.kind, [bid.part for bid in bids])
        one_host = len({bid.host for bid in bids}) == 1
        plan = make_plan(stream, sizes, self._device, one_host=one_host)
        kinds = [{rank: kind_of(metas, rank, bid) for rank, offer in enumerate(metas.offers) if offer} for bid in bids]
        by = sorted({kinds[n][read.held.owner] for n, each in enumerate(group) for read in crossing(reads, each.rank)})
        return Agreed(metas, reads, group, stream, sources, plan, sizes.ring_bytes, kinds[self._fleet.rank], ", ".join(by))

    # --- hooks of Updater ----------------------------------------------------------------------------------------------

    def _prepare(self, stack: contextlib.ExitStack, name: str, settings: Settings) -> Prepared:
        agreed = self._agreed
        if agreed is None:
            raise AgreementError("nothing was agreed on")
        me = agreed.group[self._fleet.rank].rank
        member = me < agreed.metas.world_size
        own_regions = self._use(stack, name, agreed.metas.ranks[me].regions) if member else ()
        plan = agreed.plan
        self._keeper.prepare(plan)
        supply = stack.enter_context(
            Supply(
                agreed.metas,
                agreed.reads,
                agreed.group,
                agreed.kinds,
                self._transports,
                self._read_into(stack, name, agreed),
                settings.connect_timeout,
            )
        )
        own = {number: region for number, (rank, region) in enumerate(agreed.sources) if rank == me}
        into_ring = self._device if self._into_ring(agreed) else None
        feed = Feed(supply, agreed.stream.ranks[self._fleet.rank].regions, own, settings.connect_timeout, into_ring)
        self._make_pass = partial(FetchPass, feed)
        return Prepared(agreed.metas, plan, (*supply.slots, *own_regions), None, supply.sources_of)

    def _read_into(self, stack: contextlib.ExitStack, name: str, agreed: Agreed) -> tuple[Slot, ...]:
        """A few, used again and again; one for each piece until `stack` ends, when what is read shall stay; none to read into
        the ring."""
        rank, plan = self._fleet.rank, agreed.plan
        if self._into_ring(agreed):
            return ()
        if not self._keeping:
            pieces = sum(piece.owner == rank for bucket in plan.buckets for piece in bucket.pieces)
            return self._slots.take(min(SLOTS, pieces), plan.piece_bytes)
        reads = [tensor for region in agreed.stream.ranks[rank].regions for tensor in region.tensors]
        landing = Landing(self._registry, name, plan, rank, reads)
        slots = tuple(stack.enter_context(Slot(self._device, place.nbytes, place)) for place in landing.places)
        self._landing = landing, slots
        return slots

    def _into_ring(self, agreed: Agreed) -> bool:
        """On a CPU, by transports that are known to write nothing late."""
        quiescing = set(agreed.kinds.values()) <= {"tcp", "shm"}
        return self._device.kind == "cpu" and not self._device.staging_slots and quiescing and not self._keeping

    def _give_back(self, name: str, settings: Settings) -> None:
        super()._give_back(name, settings)
        if settings.free_after_update:
            self._slots.close()

    def _ring_bytes(self, name: str) -> int:
        return self._agreed.ring_bytes if self._agreed is not None else 0
