"""Whether workers pull their bytes straight from the servers' memory: all ranks come to the same answer. (Whether they prepare
for it, each for its own worker: nothing depends on that but when all are ready.)

Before that they register all of that memory with their device, once, in the background of an update that does not pull. That is
not free: the driver lets nothing else of the worker's process through meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from checkpoint_engine.devices.base import Device
from checkpoint_engine.errors import AgreementError
from checkpoint_engine.manifest import Manifest, hex_digest
from checkpoint_engine.planning.cost import H200, H200_PULL, predict_pull, predict_replayed
from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.recent import Recent
from checkpoint_engine.server.mapped import OpenRegions
from checkpoint_engine.server.offer import Offer
from checkpoint_engine.server.pipeline import Pass
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.links import Links
from checkpoint_engine.transport.messages import Attach

log = logging.getLogger(__name__)
KEPT_PLANS = 8

START_SECONDS = 0.04
"""Of an update by broadcasts or copies, which the prediction leaves out and pulling saves: rings are made and mapped, the first
piece has to pass all stages. With it 0.202, 0.606 and 0.655 s are predicted for qwen3-8b, 30b-a3b and 32b on two H200s, where
0.201, 0.613 and 0.664 were measured."""

REGISTER_SECONDS = 0.08e-9
"""For a byte and a worker: updates in which two workers registered 61.1 GB each took 8.9 s longer on two H200s, 65.5 GB 10.9 s,
and 16.4 GB 2.7 s. (One alone takes 0.055 s a GB.)"""
PAYS_BACK = 100
"""Updates in which pulling has to save what registering takes."""


class Method(NamedTuple):
    """pull: workers map all ranks' regions. ahead: not yet, but they begin to, for the next update."""

    pull: bool
    ahead: bool = False


def regions_digest(offers: Sequence[Offer]) -> str:
    """Of all ranks' regions; another one when any was made anew."""
    return hex_digest(msgspec.msgpack.encode([offer.regions for offer in offers]))


def choose_method(offers: Sequence[Offer], broadcast: Callable[[], float], last: str = "") -> Method:
    """Pull where some rank insists on it; broadcast where one insists on that. Otherwise, where workers need no preparation (on
    CPUs), pull if it is possible, else if they have their load plans ready, and it is predicted to be faster. They prepare for it
    where that pays soon, and the regions are those of the update before: they may be made anew for every update.

    broadcast: how many seconds that is predicted to take. last: digest of the regions of the last update.

    Raises AgreementError when it must be and cannot.
    """
    wanted = {offer.method for offer in offers}
    if wanted >= {"pull", "broadcast"}:
        raise AgreementError("some ranks want to pull, others to broadcast (CHECKPOINT_ENGINE_METHOD)")
    obstacle = _obstacle(offers)
    if "pull" in wanted:
        if obstacle is not None:
            raise AgreementError(f"workers cannot pull: {obstacle}")
        return Method(pull=True)
    if obstacle is not None or "broadcast" in wanted:
        return Method(pull=False)
    if all(offer.maps for offer in offers):
        return Method(pull=True)
    reads = [offer.reads for offer in offers]
    regions = regions_digest(offers)
    ready = all(offer.ahead == regions for offer in offers)
    price = 0.0 if ready else _registering(offers) / PAYS_BACK
    if min(reads) < 0 or predict_pull(reads, H200_PULL) + price >= broadcast():
        return Method(pull=False)
    return Method(pull=ready, ahead=not ready and regions == last)


def _registering(offers: Sequence[Offer]) -> float:
    """Seconds."""
    return REGISTER_SECONDS * len(offers) * sum(region.nbytes for offer in offers for region in offer.regions or ())


def _obstacle(offers: Sequence[Offer]) -> str | None:
    for rank, offer in enumerate(offers):
        if offer.where != offers[0].where:
            return f"rank {rank} ({offer.host}) is on another host than rank 0, or in other namespaces, or another user's"
    for rank, offer in enumerate(offers):
        if offer.regions is None:
            return f"rank {rank} ({offer.host}) has memory that cannot be mapped: files in place, or it may not share it"
    return None


class Puller:
    """What one rank remembers of its updates for the choice in the next one."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._reads: Recent[str, int] = Recent(KEPT_PLANS)  # by the plan's digest
        self._seconds: Recent[str, float] = Recent(KEPT_PLANS)  # likewise
        self._ahead = ""
        self._last = ""  # the regions of the last update that went well

    def shares(self, settings: Settings) -> bool:
        """Whether workers may map this rank's regions."""
        if settings.method == "auto":
            return settings.map_regions or self._device.kind != "cpu"
        return settings.method == "pull"

    def likely(self, settings: Settings) -> bool:
        """Whether the next update will probably be pulled: no memory is allocated for a broadcast before that is known."""
        return settings.method == "pull" or self._device.kind == "cpu" or self._ahead != ""

    def offer(self, offer: Offer, settings: Settings) -> Offer:
        reads = self._reads.get(offer.plan, -1)
        maps = self._device.kind == "cpu"
        return msgspec.structs.replace(offer, method=settings.method, maps=maps, reads=reads, ahead=self._ahead)

    def open(
        self, stack: contextlib.ExitStack, links: Links, offers: Sequence[Offer], plan: Plan, manifest: Manifest, seconds: float
    ) -> tuple[Method, OpenRegions | None]:
        """The method, and all ranks' regions if it needs them. Raises AgreementError, on all ranks, when all must pull and some
        rank cannot."""
        broadcast = functools.partial(self._broadcast_seconds, plan, len(offers))
        method, self._ahead = choose_method(offers, broadcast, self._last), ""  # until the update has gone well
        if not (method.pull or method.ahead):
            return method, None
        opened: OpenRegions | None = None
        reason = ""
        try:
            shared = [region for offer in offers for region in offer.regions or ()]
            opened = stack.enter_context(OpenRegions(shared, manifest, writable=self._device.kind == "cuda"))
        except OSError as e:
            reason = str(e)
            log.info("rank %d cannot map the other ranks' memory: %s", links.rank, e)
        if not method.pull:
            return method, opened
        answers = links.exchange("mapping", reason.encode(), seconds)
        refusals = [f"rank {rank}: {answer.decode()}" for rank, answer in enumerate(answers) if answer]
        if not refusals:
            return method, opened
        if any(offer.method == "pull" for offer in offers):
            raise AgreementError(f"workers cannot pull: {'; '.join(refusals)}")
        return Method(pull=False), None

    def _broadcast_seconds(self, plan: Plan, world_size: int) -> float:
        staging = self._device.staging_slots
        predicted = self._seconds.of(plan.digest, lambda: predict_replayed(plan, H200, world_size, staging=staging).seconds)
        return START_SECONDS + max(predicted, plan.nbytes / H200_PULL.memory)

    def settle(self, offers: Sequence[Offer], plan: Plan, reads: int, *, mapped: bool) -> None:
        """An update has gone well. reads: of Crew; mapped: the workers have the regions ready."""
        self._reads.put(plan.digest, reads)
        self._last = regions_digest(offers)
        self._ahead = self._last if mapped else ""


class AheadPass(Pass):
    """A pass that also tells its worker which regions it is going to pull from in the next update."""

    def __init__(self, source: OpenRegions, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._source = source

    def _attachment(self) -> tuple[Attach, tuple[int, ...]]:
        attach, descriptors = super()._attachment()
        return msgspec.structs.replace(attach, ahead=self._source.handles), (*descriptors, *self._source.descriptors)
