"""The frame of an update on one rank: prepare, agree with the others, run, report."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

import torch

from checkpoint_engine.devices.base import Device
from checkpoint_engine.errors import AgreementError, CheckpointEngineError
from checkpoint_engine.memory.registry import Registry
from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.server.events import SessionFailed, WorkerCame
from checkpoint_engine.server.fleet import Fleet
from checkpoint_engine.server.gather import Gatherer
from checkpoint_engine.server.keeper import Keeper
from checkpoint_engine.server.offer import Offer, exchange_offers
from checkpoint_engine.server.report import StageReport, UpdateReport, slowest
from checkpoint_engine.server.update import RequestFunction, UpdateRun
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.session import SessionListener

log = logging.getLogger(__name__)


class Updater:
    """Runs updates, one at a time, with what the server keeps. Owns none of it."""

    def __init__(self, fleet: Fleet, device: Device, keeper: Keeper, gatherer: Gatherer, registry: Registry) -> None:
        self._fleet, self._device, self._keeper = fleet, device, keeper
        self._gatherer, self._registry = gatherer, registry

    def update(
        self,
        name: str,
        req_func: RequestFunction,
        settings: Settings,
        version: str | None,
        progress: Callable[[int], None] | None,
    ) -> UpdateReport:
        """See ParameterServer.update."""
        start = time.perf_counter()
        self._device.bind_thread()  # the caller's thread may be a new one
        links = self._fleet.links
        number = links.next_round  # of the exchange below, so it is the same on all ranks
        with contextlib.ExitStack() as stack:
            inbox = stack.enter_context(links.inbox(number))
            listener = stack.enter_context(
                SessionListener(
                    settings,
                    self._fleet.rank,
                    lambda channel, hello: inbox.put(self._fleet.rank, WorkerCame(channel, hello)),
                    lambda error: inbox.put(self._fleet.rank, SessionFailed(error)),
                )
            )
            plan, regions, offer = self._prepare(stack, name, version, listener.handle)
            offers = exchange_offers(links, offer, settings.join_timeout)
            if plan is None:
                raise AgreementError(offer.error)
            lane = self._keeper.join(max(o.generation for o in offers))
            checked = self._device.uuid if self._device.kind != "cpu" else None
            run = UpdateRun(inbox, offers[0].version, plan, lane, regions, links, settings, checked, progress)
            outcome = run.run(req_func, [(o.device, o.handle) for o in offers])
        self._give_back(name, settings)
        ranks = tuple({k: StageReport(s.nbytes, s.seconds) for k, s in stats.items()} for stats in outcome.stats)
        report = UpdateReport(
            version=offers[0].version,
            method="broadcast",
            nbytes=plan.nbytes,
            seconds=time.perf_counter() - start,
            passes=outcome.passes,
            stages=slowest(ranks),
            ranks=ranks,
        )
        log.info("rank %d: %s", self._fleet.rank, report)
        return report

    def _give_back(self, name: str, settings: Settings) -> None:
        """After a good update only: after a failure some worker may still have the ring mapped."""
        self._keeper.settle(self._gatherer.ring_bytes(name))
        if settings.free_after_update:
            self._keeper.free()

    def _prepare(
        self, stack: contextlib.ExitStack, name: str, version: str | None, handle: str
    ) -> tuple[Plan | None, list[torch.Tensor], Offer]:
        """Everything on this rank that can fail before the others need to know; a failure travels in the offer."""
        uuid = self._device.uuid
        try:
            manifest, plan = self._gatherer.plan(name)
            regions = []
            if manifest.ranks[self._fleet.rank].regions:
                checkpoint = stack.enter_context(self._registry.use(name))
                if checkpoint.metas() != manifest.ranks[self._fleet.rank].regions:
                    raise AgreementError(f"checkpoint {name!r} was registered anew after gather_metas: gather again")
                regions = [r.tensor for r in checkpoint.regions]
            self._keeper.prepare(plan)
            return plan, regions, Offer(name, plan.digest, version or manifest.version, uuid, handle, self._keeper.generation)
        except CheckpointEngineError as e:
            if self._fleet.world_size == 1:
                raise
            return None, [], Offer(name, "", version or "", uuid, handle, self._keeper.generation, f"{type(e).__name__}: {e}")
