"""ParameterServer: the contract's class. One per rank, beside one accelerator."""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from checkpoint_engine.devices import Device, get_device
from checkpoint_engine.engines.base import Engine
from checkpoint_engine.engines.rollout import Policy
from checkpoint_engine.errors import SettingsError, UpdateInProgressError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.memory.registry import Registry
from checkpoint_engine.memory.safetensors import parse_file
from checkpoint_engine.planning.sizes import preferred_piece
from checkpoint_engine.planning.stripe import stripe as stripe_tensors
from checkpoint_engine.server.fleet import Fleet
from checkpoint_engine.server.gather import Gatherer
from checkpoint_engine.server.keeper import Keeper
from checkpoint_engine.server.place import find_place, local_rank
from checkpoint_engine.server.receivers import Receivers
from checkpoint_engine.server.report import UpdateReport
from checkpoint_engine.server.rollout import Rollout, RolloutReport
from checkpoint_engine.server.sources import Sources
from checkpoint_engine.server.update import RequestFunction
from checkpoint_engine.server.updater import Updater
from checkpoint_engine.server.watch import Watch
from checkpoint_engine.settings import Settings

PUSHED = "push"
"""The name under which `push` registers."""


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
        self._rank, self._world_size = find_place(rank, world_size, auto_pg)
        self._auto_pg = auto_pg
        self._owns_default_group = False
        number = local_rank(self._rank, gpu_count, self._settings.device)
        self._device: Device = get_device(self._settings.device, number)
        self._device.bind_thread()
        self._fleet = Fleet(self._rank, self._world_size, self._settings, master_addr, master_port)
        self._registered_memory: dict[int, Any] = {}
        hooks = self._register_memory, self._unregister_memory
        self._registry = Registry(self._settings, *hooks, on_map=lambda region: self._device.place(region.tensor))
        self._gatherer = Gatherer(self._fleet, self._device, self._settings)
        self._keeper = Keeper(self._fleet, self._device)
        self._sources = Sources(self._fleet, self._settings)
        parts = (self._fleet, self._device, self._keeper, self._gatherer, self._registry)
        self.watch = Watch(self._fleet, self._device, self._registry, self._keeper)
        self._updater, self._receivers = Updater(*parts), Receivers(*parts, self._sources, self._settings, self.watch.follow)
        self._updating = threading.Lock()
        self._p2p_store: object = self._sources  # callers set it to None: peers cannot read this rank then

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

        Raises CheckpointExistsError, FileFormatError, TensorError, DuplicateTensorError, CheckpointError; others stay the same.
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

        Raises CheckpointNotFoundError; CheckpointBusyError while an update reads it, or peers, for longer than peer_wait.
        """
        self._sources.withdraw(checkpoint_name)
        self._registry.unregister(checkpoint_name, force=force)
        self._gatherer.forget(checkpoint_name)

    def _share(self, files: Sequence[str | Path]) -> list[str]:
        """This rank's part of every layer's tensors in `files`. Raises FileFormatError."""
        tensors = [(t.name, t.nbytes) for file in files for t in parse_file(file).tensors]
        run_bytes = self._settings.bucket_bytes or preferred_piece(self._device.kind, self._world_size)
        return stripe_tensors(tensors, self._world_size, run_bytes)[self._rank]

    # --- what everybody holds ------------------------------------------------------------------------------------------

    def gather_metas(self, checkpoint_name: str) -> None:
        """Collective: agree on who holds what of the checkpoint. A rank that registered nothing takes part with nothing.

        When no rank holds any, as before `load_metas`, `update` raises. Raises AgreementError, DeadlineError, PeerLostError.
        """
        held = [self._registry[checkpoint_name]] if checkpoint_name in self._registry else []
        regions = held[0].regions if held and self._p2p_store is not None else ()
        self._gatherer.gather(checkpoint_name, held[0].metas() if held else (), self._sources.offer(checkpoint_name, regions))

    def get_metas(self) -> Manifest:
        """The manifest that was gathered or loaded last, with what peers need to read it. Picklable; `to_json` does without."""
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
        timeout: datetime.timedelta | None = None,
        ranks: Sequence[int] | None = None,
        version: str | None = None,
        progress: Callable[[int], None] | None = None,
        verify: str | None = None,
        keep: bool = False,
    ) -> UpdateReport:
        """Collective: put the checkpoint into the engines of all ranks, or of `ranks`.

        req_func  called on every rank, in a thread, with [(device uuid, handle)] of all ranks in rank order; asks the
                  engine to call `update_weights_from_ipc` in its workers. Its return proves nothing, its raising ends the
                  update
        timeout   for the whole update; None: Settings.timeout
        ranks     these read what they need from the ranks of the metas that were gathered or loaded; the others need not call
                  this, and return at once with an empty report. None or []: all, by broadcast
        version   what the engines say they serve from then on; None: checkpoint name and 12 digits of its digest
        progress  called with the bytes of each bucket when it is complete on this rank
        verify    None: as Settings.verify, which says what it is. Tensors that changed fail the update in stage "verify"
        keep      with ranks: what this rank reads stays registered, as its part of the checkpoint

        Returns after all workers on all ranks have committed. Raises UpdateError on every rank when it failed on any,
        UpdateInProgressError, CheckpointNotFoundError, AgreementError.
        """
        if not self._updating.acquire(blocking=False):
            raise UpdateInProgressError(f"rank {self._rank} is updating already; one update at a time")
        try:
            settings = self._settings if timeout is None else self._settings.replace(timeout=timeout.total_seconds())
            settings = settings.replace(verify=verify or settings.verify)
            with self.watch.doing(checkpoint_name, version, rollout=False, apart=bool(ranks)) as outcome:
                what = (checkpoint_name, req_func, settings, version, self.watch.moved(progress))
                return outcome.keep(self._receivers.update(*what, ranks, keep) if ranks else self._updater.update(*what))
        finally:
            try:
                self._end_default_group()
            finally:
                self._updating.release()

    def _end_default_group(self) -> None:
        if self._auto_pg and self._owns_default_group:
            self._owns_default_group = False
            if dist.is_initialized():
                dist.destroy_process_group()

    def roll_out(
        self,
        checkpoint_name: str,
        *,
        engines: Sequence[Engine],
        policy: Policy | None = None,
        version: str | None = None,
        timeout: datetime.timedelta | None = None,
        progress: Callable[[int], None] | None = None,
        read: bool = False,
        verify: str | None = None,
        keep: bool = False,
    ) -> RolloutReport:
        """Collective: `update` of these engines, with all that belongs around it (pause, reset the cache, publish, resume).

        Engine i serves ranks [i*K, (i+1)*K), K = world size / number of engines. policy: how they are paused, and what follows a
        failure; None: Policy(), which pauses none and goes on without none. read: from the peers that the metas name, as `update`
        with all ranks; keep: as there. All other arguments as for `update`, after gather_metas of the same checkpoint. Raises
        what `update` raises, EngineError, and ReplicaError for another rank's engine; the error's notes say which engines need
        their operator.
        """
        version = version or self.get_metas().version
        seconds = timeout.total_seconds() if timeout else self._settings.timeout
        rollout = Rollout(self._fleet.links, engines, policy or Policy(), seconds, self._settings.join_timeout)
        options: dict[str, Any] = {"timeout": timeout, "version": version, "progress": progress, "verify": verify}
        options |= {"ranks": range(self._world_size), "keep": keep} if read else {}
        with self.watch.doing(checkpoint_name, version, rollout=True) as outcome:
            return outcome.keep(rollout.run(lambda request: self.update(checkpoint_name, request, **options), version))

    def push(
        self,
        named_tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        *,
        engines: Sequence[Engine],
        version: str | None = None,
        policy: Policy | None = None,
        timeout: datetime.timedelta | None = None,
        keep: bool = True,
        verify: str | None = None,
    ) -> RolloutReport:
        """Collective: this rank's tensors, together with the other ranks', into `engines`, in one call; see `roll_out`.

        keep: the tensors stay in host memory, which the next push of the same names and shapes uses again; False: it is given
        back at the end. Raises what register_checkpoint, gather_metas and roll_out raise.
        """
        if PUSHED in self._registry:
            self._sources.withdraw(PUSHED)
            self._registry.unregister(PUSHED)
        self.register_checkpoint(PUSHED, named_tensors=dict(named_tensors), use_shared_memory_pool=keep)
        try:
            self.gather_metas(PUSHED)
            return self.roll_out(PUSHED, engines=engines, policy=policy, version=version, timeout=timeout, verify=verify)
        finally:
            if not keep:
                self.unregister_checkpoint(PUSHED)

    # --- life ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give everything back: device memory, checkpoints, links. The default group stays the caller's."""
        with contextlib.ExitStack() as stack:  # each, whatever the others raise
            for part in (self._fleet, self._registry, self._keeper, self._receivers, self._sources):
                stack.callback(part.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _register_memory(self, region: Any) -> None:
        self._registered_memory[id(region)] = self._device.register_host(region.tensor)

    def _unregister_memory(self, region: Any) -> None:
        self._registered_memory.pop(id(region)).close()
