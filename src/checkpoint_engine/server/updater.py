"""The frame of an update on one rank: prepare, agree with the others, run, report."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import msgspec
import torch

from checkpoint_engine.devices.base import Device
from checkpoint_engine.devices.polling import poll
from checkpoint_engine.errors import AgreementError, DeadlineError, PeerLostError, UpdateError, said
from checkpoint_engine.manifest import Manifest, RegionMeta
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.memory.registry import Registry
from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.planning.sharing import Shares
from checkpoint_engine.server.events import SessionFailed, WorkerCame
from checkpoint_engine.server.expected import Expected
from checkpoint_engine.server.fleet import Fleet
from checkpoint_engine.server.gather import Gatherer
from checkpoint_engine.server.keeper import Keeper
from checkpoint_engine.server.lane import Lane
from checkpoint_engine.server.mapped import Grouping, MappedPass, OpenRegions, describe
from checkpoint_engine.server.neighbours import meet_neighbours
from checkpoint_engine.server.offer import Offer, exchange_offers, verified
from checkpoint_engine.server.pipeline import Pass
from checkpoint_engine.server.pull import AheadPass, Method, Puller
from checkpoint_engine.server.report import Outcome, UpdateReport, make_report, method_name
from checkpoint_engine.server.request import RequestFunction
from checkpoint_engine.server.served import Commit, Served
from checkpoint_engine.server.slices import SliceBook
from checkpoint_engine.server.sparse import Sparse
from checkpoint_engine.server.update import CAUSE_SECONDS, UpdateRun
from checkpoint_engine.settings import Settings
from checkpoint_engine.timeline import Recorder, span_limit
from checkpoint_engine.transport.descriptors import SharedDescriptor, whereabouts
from checkpoint_engine.transport.links import LEFT, Inbox
from checkpoint_engine.transport.messages import Failure, Stopped
from checkpoint_engine.transport.session import SessionListener

log = logging.getLogger(__name__)
PAGE = 4096


class HostMemory(Protocol):
    """What pieces are lifted from: regions, or slots that were read into."""

    @property
    def tensor(self) -> torch.Tensor: ...


class Prepared(NamedTuple):
    """What an update needs of this rank. shared: the regions as other ranks may open them; None: they may not. sources: which
    ranks of the manifest a tensor's bytes come from; None: those that the plan names."""

    manifest: Manifest
    plan: Plan
    regions: tuple[HostMemory, ...]
    shared: tuple[SharedDescriptor, ...] | None
    sources: Callable[[str], tuple[int, ...]] | None = None


class Updater:
    """Runs updates, one at a time, with what the server keeps. Owns none of it."""

    def __init__(
        self, fleet: Fleet, device: Device, keeper: Keeper, gatherer: Gatherer, registry: Registry, served: Served
    ) -> None:
        self._fleet, self._device, self._keeper = fleet, device, keeper
        self._gatherer, self._registry, self._served = gatherer, registry, served
        self._puller, self._sparse, self._grouping = Puller(device), Sparse(device), Grouping(device)
        self._book: SliceBook | None = SliceBook()
        self._make_pass: Callable[..., Pass] = Pass

    def update(
        self,
        name: str,
        req_func: RequestFunction,
        settings: Settings,
        version: str | None,
        progress: Callable[[int], None] | None,
    ) -> UpdateReport:
        """See ParameterServer.update."""
        start, links = time.perf_counter(), self._fleet.links
        self._device.bind_thread()  # the caller's thread may be a new one
        number = links.next_round("update")  # of the exchange below, so it is the same on all ranks
        with contextlib.ExitStack() as stack:
            inbox = stack.enter_context(links.inbox(number))
            listener = stack.enter_context(self._listen(inbox, settings))
            prepared = self._try_to_prepare(stack, name, settings)
            mine = self._offer(prepared, name, version, listener.handle, settings)
            offers = exchange_offers(links, mine, settings.join_timeout, number)
            if isinstance(prepared, Exception):
                raise prepared
            recorder = Recorder(time.perf_counter(), span_limit(len(offers)), enabled=settings.timelines)
            plan = prepared.plan
            method, opened = self._puller.open(stack, links, offers, plan, prepared.manifest, settings.join_timeout)
            make_pass = self._pass_of(method, opened)
            lane, shares = self._lane(stack, number, offers, plan, settings, method)
            recorder.lap("join")
            run = UpdateRun(
                inbox,
                offers[0].version,
                plan,
                lane,
                [region.tensor for region in prepared.regions],
                links,
                [offer.host for offer in offers],
                settings,
                self._served,
                make_pass,
                self._device.uuid if self._device.kind != "cpu" else None,
                progress,
                recorder,
                self._expected(offers, prepared),
                shares,
            )
            with self._served.updating(Commit(prepared.manifest, offers[0].version)):
                outcome = run.run(req_func, [(o.device, o.handle) for o in offers])
        self._give_back(name, settings)
        self._settle(offers, plan, lane, outcome, mapped=opened is not None)
        by = method_name(lane.method, outcome.ways, mapped=method.pull)
        return self._report(offers[0].version, by, plan.nbytes, start, outcome, shares)

    def _pass_of(self, method: Method, opened: OpenRegions | None) -> Callable[..., Pass]:
        if opened is None:
            return self._make_pass
        return partial(MappedPass, opened, self._grouping) if method.pull else partial(AheadPass, opened)

    def _report(self, version: str, by: str, nbytes: int, start: float, outcome: Outcome, shares: Shares | None) -> UpdateReport:
        report = make_report(version, by, nbytes, time.perf_counter() - start, outcome, self._keeper.saved(shares))
        log.info("rank %d: %s", self._fleet.rank, report)
        return report

    def _settle(self, offers: list[Offer], plan: Plan, lane: Lane, outcome: Outcome, *, mapped: bool) -> None:
        """What the next update has to know of one that went well."""
        self._keeper.proven = lane.method == "copies"
        self._puller.settle(offers, plan, outcome.reads, mapped=mapped and outcome.ahead)
        self._sparse.settle(plan, outcome.needs)

    def _expected(self, offers: list[Offer], prepared: Prepared) -> Expected | None:
        if not verified(offers):
            return None
        return Expected(prepared.plan, prepared.manifest, prepared.sources, self._book)

    def _listen(self, inbox: Inbox, settings: Settings) -> SessionListener:
        rank = self._fleet.rank
        return SessionListener(
            settings,
            rank,
            lambda channel, hello: inbox.put(rank, WorkerCame(channel, hello)),
            lambda error: inbox.put(rank, SessionFailed(error)),
        )

    def _lane(
        self,
        stack: contextlib.ExitStack,
        number: int,
        offers: list[Offer],
        plan: Plan,
        settings: Settings,
        method: Method,
    ) -> tuple[Lane, Shares | None]:
        """As `_join`; an empty one for an update in which nothing is lifted or shared."""
        if method.pull:
            return stack.enter_context(Lane(self._device, self._fleet.rank, ring_bytes=PAGE, piece_bytes=PAGE)), None
        return self._join(stack, number, offers, plan, settings)

    def _join(
        self, stack: contextlib.ExitStack, number: int, offers: list[Offer], plan: Plan, settings: Settings
    ) -> tuple[Lane, Shares | None]:
        """The lane with what it shares by, and who takes part in which bucket. A rank that cannot join says so, for the others
        wait for it there or in the update."""
        links, generation = self._fleet.links, max(offer.generation for offer in offers)
        try:
            prepare = partial(self._keeper.prepare, plan)
            if len({offer.where for offer in offers}) == 1 < len(offers) and all(offer.copies for offer in offers):
                hosts = [offer.host for offer in offers]
                proven, self._keeper.proven = self._keeper.proven, False  # until this update has gone well
                lane = meet_neighbours(stack, links, prepare, hosts, proven, settings.timeout, settings.join_timeout)
                if lane is not None:
                    return lane, self._sparse.shares(offers, plan, copies=True)
            prepare()
            lane, shares = self._keeper.join(generation, settings.timeout), self._sparse.shares(offers, plan, copies=False)
            self._keeper.group([shares.members(group) for group in shares.groups] if shares is not None else [])
            return lane, shares
        except BaseException as e:
            self._keeper.skip(generation)
            failure = self._join_failure(e, number, [offer.host for offer in offers])
            if not isinstance(e, UpdateError):  # another rank's, which told everybody
                links.tell(failure, to_self=False)
            links.tell(Stopped(number, 0), to_self=False)  # who went on need not wait for this rank
            if isinstance(e, UpdateError) or not isinstance(e, Exception):
                raise
            raise UpdateError(rank=failure.rank, host=failure.host, stage="join", reason=failure.reason) from e

    def _join_failure(self, error: BaseException, number: int, hosts: list[str]) -> Failure:
        """Whose fault it is: this rank's, unless what it waited for in vain is a rank that is gone."""
        links = self._fleet.links
        if isinstance(error, OSError | PeerLostError | AgreementError | DeadlineError):
            poll(lambda: bool(links.lost), CAUSE_SECONDS)
        gone = [rank for rank, why in links.lost.items() if why != LEFT]  # who failed for the same reason has left already
        rank = min(gone, default=links.rank)
        reason = said(error)
        return Failure(number, rank, hosts[rank], "join", reason)

    def _give_back(self, name: str, settings: Settings) -> None:
        """After a good update only: after a failure some worker may still have the ring mapped."""
        self._keeper.settle(self._ring_bytes(name))
        if settings.free_after_update:
            self._keeper.free()

    def _ring_bytes(self, name: str) -> int:
        """Of a ring that no tensor enlarged."""
        return self._gatherer.ring_bytes(name)

    def _try_to_prepare(self, stack: contextlib.ExitStack, name: str, settings: Settings) -> Prepared | Exception:
        """Everything on this rank that can fail before the others need to know; a failure travels in the offer."""
        try:
            return self._prepare(stack, name, settings)
        except Exception as e:  # of any kind: the others must not wait for this rank
            if self._fleet.world_size == 1:
                raise
            return e

    def _prepare(self, stack: contextlib.ExitStack, name: str, settings: Settings) -> Prepared:
        manifest, plan = self._gatherer.plan(name)
        mine = manifest.ranks[self._fleet.rank].regions
        regions = self._use(stack, name, mine) if mine else ()
        shared = describe(regions) if self._puller.shares(settings) else None
        if shared is None or not self._puller.likely(settings):  # else there may be no need of a lane
            self._keeper.prepare(plan)
        self._keeper.mend()
        return Prepared(manifest, plan, regions, shared)

    def _use(self, stack: contextlib.ExitStack, name: str, gathered: tuple[RegionMeta, ...]) -> tuple[HostRegion, ...]:
        """This rank's own regions, kept until `stack` ends. Raises AgreementError when they are not those that were gathered."""
        checkpoint = stack.enter_context(self._registry.use(name))
        if checkpoint.metas() != gathered:
            raise AgreementError(f"checkpoint {name!r} was registered anew after gather_metas: gather again")
        return checkpoint.regions

    def _offer(self, prepared: Prepared | Exception, name: str, version: str | None, handle: str, settings: Settings) -> Offer:
        host = socket.gethostname()
        offer = Offer(
            name, "", version or "", self._device.uuid, handle, self._keeper.generation, host, whereabouts(), settings.peer_copies
        )
        if isinstance(prepared, Exception):
            return msgspec.structs.replace(offer, error=f"{type(prepared).__name__}: {prepared}")
        offer = msgspec.structs.replace(
            offer, plan=prepared.plan.digest, version=version or prepared.manifest.version, regions=prepared.shared
        )
        offer = self._sparse.offer(msgspec.structs.replace(offer, verify=settings.verify), settings)
        return self._puller.offer(offer, settings)
