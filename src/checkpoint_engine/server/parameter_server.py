"""ParameterServer: the contract's class. One per rank, beside one accelerator."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import torch
import torch.distributed as dist

from checkpoint_engine.devices import Device, get_device
from checkpoint_engine.errors import (
    AgreementError,
    CheckpointEngineError,
    SettingsError,
    UpdateInProgressError,
)
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.memory.registry import Registry
from checkpoint_engine.memory.safetensors import parse_file
from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.planning.sizes import preferred_bucket
from checkpoint_engine.planning.stripe import stripe as stripe_tensors
from checkpoint_engine.server.fleet import Fleet
from checkpoint_engine.server.gather import Gatherer
from checkpoint_engine.server.lane import Lane
from checkpoint_engine.server.report import StageReport, UpdateReport, slowest
from checkpoint_engine.server.update import RequestFunction, SessionFailed, UpdateRun, WorkerCame
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.session import SessionListener

log = logging.getLogger(__name__)
_UNSET: Any = object()


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """What each rank brings to the start of an update. error: why this rank cannot take part."""

    checkpoint: str
    plan: str
    version: str
    device: str
    handle: str
    generation: int
    error: str = ""


class ParameterServer:
    """Holds this rank's part of checkpoints in host memory and updates engines from it. A context manager.

    rank, world_size   None: RANK and WORLD_SIZE, or those of torch's default group when auto_pg is False
    auto_pg            True: `init_process_group` makes torch's default group and `update` ends it; False: the caller owns it
    gpu_count          accelerators of this host; None: as many as are visible. Rank r is beside accelerator r % gpu_count
    mem_fraction       at most this part of the smallest free device memory is used
    master_addr, _port where rank 0 is; None: MASTER_ADDR, MASTER_PORT. Its store listens on the port after it
    settings           None: defaults and environment

    Every rank must call the collective methods (gather_metas, update, store_based_barrier, push) in the same order.
    """

    def __init__(
        self,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        auto_pg: bool = True,
        gpu_count: int | None = None,
        mem_fraction: float | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
        settings: Settings | None = None,
    ) -> None:
        self._settings = settings or Settings.from_environment(mem_fraction=mem_fraction)
        self._rank, self._world_size = _place(rank, world_size, auto_pg)
        self._auto_pg = auto_pg
        self._owns_default_group = False
        self._device: Device = get_device(index=_local_rank(self._rank, gpu_count))
        self._device.bind_thread()
        self._fleet = Fleet(self._rank, self._world_size, self._settings, master_addr, master_port)
        self._registered_memory: dict[int, Any] = {}
        self._registry = Registry(self._settings, on_create=self._register_memory, on_destroy=self._unregister_memory)
        self._gatherer = Gatherer(self._fleet, self._device, self._settings)
        self._lane: Lane | None = None
        self._generation = 0
        self._updating = threading.Lock()
        self._p2p_store: object = None  # callers set it to None to switch peer-to-peer off

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    # --- checkpoints ---------------------------------------------------------------------------------------------------

    def register_checkpoint(
        self,
        checkpoint_name: str,
        *,
        files: Sequence[str | Path] | None = None,
        named_tensors: Mapping[str, torch.Tensor] | None = None,
        use_shared_memory_pool: bool = False,
        use_inplace_pin_memory: bool = True,
        stripe: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Bring this rank's part of a checkpoint into host memory.

        files                   safetensors files that belong to this rank; with `stripe`, files that all ranks see, of
                                which each takes its share of every layer's bytes
        named_tensors           tensors in memory, on any device; copied
        use_shared_memory_pool  keep the memory when the checkpoint is unregistered, for the next one of the same shape
        use_inplace_pin_memory  files in /dev/shm are used where they are. Nothing is ever deleted
        progress                called with (bytes done, bytes in all)

        Raises CheckpointExistsError, FileFormatError, TensorError, DuplicateTensorError, CheckpointError; whatever was
        registered before is untouched then.
        """
        self._registry.register(
            checkpoint_name,
            files=files,
            named_tensors=named_tensors,
            select=self._share(files or ()) if stripe else None,
            use_shared_memory_pool=use_shared_memory_pool,
            use_inplace_pin_memory=use_inplace_pin_memory,
            progress=progress,
        )

    def unregister_checkpoint(self, checkpoint_name: str, force: bool = False) -> None:
        """Give its memory back; pooled memory only with `force`.

        Raises CheckpointNotFoundError, and CheckpointBusyError while an update reads it.
        """
        self._registry.unregister(checkpoint_name, force=force)
        self._gatherer.forget(checkpoint_name)

    def _share(self, files: Sequence[str | Path]) -> list[str]:
        """This rank's part of every layer's tensors in `files`. Raises FileFormatError."""
        tensors = [(t.name, t.nbytes) for file in files for t in parse_file(file).tensors]
        run_bytes = self._settings.bucket_bytes or preferred_bucket(self._device.name, self._world_size)
        return stripe_tensors(tensors, self._world_size, run_bytes)[self._rank]

    # --- what everybody holds ------------------------------------------------------------------------------------------

    def gather_metas(self, checkpoint_name: str) -> None:
        """Collective: agree on who holds what of the checkpoint. A rank that registered nothing takes part with nothing.

        Raises CheckpointNotFoundError when no rank holds anything, AgreementError, DeadlineError, PeerLostError.
        """
        regions = self._registry[checkpoint_name].metas() if checkpoint_name in self._registry.names() else ()
        self._gatherer.gather(checkpoint_name, regions)

    def get_metas(self) -> Manifest:
        """The manifest that was gathered or loaded last. Picklable, and `to_json` writes it without pickle."""
        return self._gatherer.current()

    def load_metas(self, metas: Manifest) -> None:
        """Take a manifest that another world gathered."""
        if not isinstance(metas, Manifest):
            raise SettingsError(f"load_metas takes what get_metas returned, not {type(metas).__name__}")
        self._gatherer.load(metas)

    def init_process_group(self, *, timeout: datetime.timedelta = datetime.timedelta(minutes=10)) -> None:
        """Initialise torch's default group, for callers that use it. Under auto_pg it lives until the end of `update`."""
        if dist.is_initialized():
            return
        self._fleet.init_default_group(self._device.backend, timeout)
        self._owns_default_group = True

    def store_based_barrier(self, timeout: datetime.timedelta = datetime.timedelta(minutes=5)) -> None:
        """Collective: return when all ranks have called it. Raises DeadlineError naming who did not, PeerLostError."""
        self._fleet.links.exchange("barrier", b"", timeout.total_seconds())

    # --- update --------------------------------------------------------------------------------------------------------

    def update(
        self,
        checkpoint_name: str,
        req_func: RequestFunction,
        *,
        timeout: datetime.timedelta = _UNSET,
        ranks: Sequence[int] | None = None,
        version: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> UpdateReport:
        """Collective: put the checkpoint into the engines of all ranks.

        req_func  called on every rank, in a thread, with [(device uuid, handle)] of all ranks in rank order; asks the
                  engine to call `update_weights_from_ipc` in its workers. Its return proves nothing, its raising ends the
                  update
        timeout   for the whole update; None: Settings.timeout
        version   what the engines say they serve from then on; None: checkpoint name and 12 digits of its digest
        progress  called with the bytes of each bucket when it is complete on this rank

        Returns after all workers on all ranks have committed. Raises UpdateError on every rank when it failed on any,
        UpdateInProgressError, CheckpointNotFoundError, AgreementError.
        """
        if ranks:
            raise SettingsError("update(ranks=[...]), the peer-to-peer method, is not there yet: leave it out to broadcast")
        if not self._updating.acquire(blocking=False):
            raise UpdateInProgressError(f"rank {self._rank} is updating already; one update at a time")
        try:
            settings = self._settings if timeout is _UNSET else self._settings.replace(timeout=timeout.total_seconds())
            return self._update(checkpoint_name, req_func, settings, version, progress)
        finally:
            self._updating.release()
            if self._settings.free_after_update:
                self._free()
            if self._auto_pg and self._owns_default_group and dist.is_initialized():
                dist.destroy_process_group()
                self._owns_default_group = False

    def _update(
        self,
        name: str,
        req_func: RequestFunction,
        settings: Settings,
        version: str | None,
        progress: Callable[[int], None] | None,
    ) -> UpdateReport:
        start = time.perf_counter()
        links = self._fleet.links
        number = links.next_round  # of the exchange below, so it is the same on all ranks
        with contextlib.ExitStack() as stack:
            inbox = stack.enter_context(links.inbox(number))
            listener = stack.enter_context(
                SessionListener(
                    settings,
                    self._rank,
                    lambda channel, hello: inbox.put(self._rank, WorkerCame(channel, hello)),
                    lambda error: inbox.put(self._rank, SessionFailed(error)),
                )
            )
            plan, regions, offer = self._prepare(stack, name, version, listener.handle)
            offers = self._exchange_offers(offer)
            if plan is None:
                raise AgreementError(offer.error)
            lane = self._join_lane(max(o.generation for o in offers))
            checked = self._device.uuid if self._device.name != "cpu" else None
            run = UpdateRun(inbox, offers[0].version, plan, lane, regions, links, settings, checked, progress)
            outcome = run.run(req_func, [(o.device, o.handle) for o in offers])
        ranks = tuple({k: StageReport(s.nbytes, s.seconds) for k, s in stats.items()} for stats in outcome.stats)
        return UpdateReport(
            version=offers[0].version,
            method="broadcast",
            nbytes=plan.nbytes,
            seconds=time.perf_counter() - start,
            passes=outcome.passes,
            stages=slowest(ranks),
            ranks=ranks,
        )

    def _prepare(
        self, stack: contextlib.ExitStack, name: str, version: str | None, handle: str
    ) -> tuple[Plan | None, list[torch.Tensor], Offer]:
        """Everything on this rank that can fail before the others need to know; a failure travels in the offer."""
        uuid = self._device.uuid
        try:
            manifest, plan = self._gatherer.plan(name)
            regions = []
            if manifest.ranks[self._rank].regions:
                checkpoint = stack.enter_context(self._registry.use(name))
                if checkpoint.metas() != manifest.ranks[self._rank].regions:
                    raise AgreementError(f"checkpoint {name!r} was registered anew after gather_metas: gather again")
                regions = [r.tensor for r in checkpoint.regions]
            self._prepare_lane(plan)
            return plan, regions, Offer(name, plan.digest, version or manifest.version, uuid, handle, self._generation)
        except CheckpointEngineError as e:
            if self._world_size == 1:
                raise
            return None, [], Offer(name, "", version or "", uuid, handle, self._generation, f"{type(e).__name__}: {e}")

    def _exchange_offers(self, mine: Offer) -> list[Offer]:
        """Raises AgreementError naming the rank that cannot take part, or wants something else than rank 0."""
        payloads = self._fleet.links.exchange("update", msgspec.msgpack.encode(mine), self._settings.join_timeout)
        offers = [msgspec.msgpack.decode(p, type=Offer) for p in payloads]
        for rank, offer in enumerate(offers):
            if offer.error:
                raise AgreementError(f"rank {rank} cannot take part in the update: {offer.error}")
            for field in ("checkpoint", "plan"):
                theirs, leaders = getattr(offer, field), getattr(offers[0], field)
                if theirs != leaders:
                    raise AgreementError(f"rank {rank} wants to update with {field} {theirs!r}, rank 0 with {leaders!r}")
        return offers

    def _prepare_lane(self, plan: Plan) -> None:
        """Keep the lane if it fits; otherwise make another, with the old one's communicator if that is still good."""
        old = self._lane
        if old is not None and old.fits(plan):
            return
        collective = None
        if old is not None:
            if old.damaged:
                self._generation += 1
            else:
                collective, old.collective = old.collective, None
            old.close()
        self._lane = None
        self._lane = Lane(self._device, self._rank, plan.ring_bytes, plan.piece_bytes, self._world_size)
        self._lane.collective = collective

    def _join_lane(self, generation: int) -> Lane:
        """A lane with the communicator that all ranks agreed on: a new one when any rank had to give the last one up."""
        lane = self._lane
        if lane is None:
            raise AgreementError("no lane was prepared")
        if generation > self._generation or lane.collective is None:
            if lane.collective is not None:
                lane.collective.close()
            self._generation = generation
            lane.collective = self._fleet.collective(self._device, generation)
        return lane

    def _free(self) -> None:
        """Give ring, staging and communicator back. The next communicator has another number, on all ranks."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None
            self._generation += 1

    # --- life ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give everything back: device memory, checkpoints, links. The default group stays the caller's."""
        self._free()
        self._registry.close()
        self._fleet.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _register_memory(self, region: Any) -> None:
        self._registered_memory[id(region)] = self._device.register_host(region.tensor)

    def _unregister_memory(self, region: Any) -> None:
        self._registered_memory.pop(id(region)).close()


def _place(rank: int | None, world_size: int | None, auto_pg: bool) -> tuple[int, int]:
    """rank=0 is a rank. Raises SettingsError naming the variable that is missing."""
    if not auto_pg and dist.is_initialized():
        rank = dist.get_rank() if rank is None else rank
        world_size = dist.get_world_size() if world_size is None else world_size
    values = {"RANK": rank, "WORLD_SIZE": world_size}
    for variable, value in values.items():
        if value is None:
            text = os.environ.get(variable)
            if text is None:
                raise SettingsError(f"pass {variable.lower()}=, or set {variable} (torchrun does)")
            try:
                values[variable] = int(text)
            except ValueError:
                raise SettingsError(f"{variable}={text!r} is not a number") from None
    return int(values["RANK"] or 0), int(values["WORLD_SIZE"] or 0)


def _local_rank(rank: int, gpu_count: int | None) -> int:
    count = gpu_count or (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return rank % count if count else int(os.environ.get("LOCAL_RANK", rank))
