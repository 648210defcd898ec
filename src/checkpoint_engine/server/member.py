"""A server as a member of a world: its place in it, what it holds, and how it leaves for another one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from checkpoint_engine.devices import Device, get_device
from checkpoint_engine.errors import SettingsError, UpdateInProgressError
from checkpoint_engine.memory.registry import Registry
from checkpoint_engine.memory.safetensors import parse_file
from checkpoint_engine.planning.sizes import preferred_piece
from checkpoint_engine.planning.stripe import stripe as stripe_tensors
from checkpoint_engine.server.fleet import Fleet
from checkpoint_engine.server.gather import Gatherer
from checkpoint_engine.server.keeper import Keeper
from checkpoint_engine.server.place import find_place, local_rank
from checkpoint_engine.server.receivers import Receivers
from checkpoint_engine.server.served import Served
from checkpoint_engine.server.sources import Sources
from checkpoint_engine.server.updater import Updater
from checkpoint_engine.server.watch import Watch
from checkpoint_engine.settings import Settings


class Member:
    """What ParameterServer is made of: see there."""

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
        self._registered_memory: dict[int, Any] = {}
        self._registry = Registry(
            self._settings,
            on_create=self._register_memory,
            on_destroy=self._unregister_memory,
            on_map=lambda region: self._device.place(region.tensor),
            sums=self._device.region_sums(),
        )
        self._served = Served()
        self._updating = threading.Lock()
        self._enter(Fleet(self._rank, self._world_size, self._settings, master_addr, master_port))
        self.watch = Watch(self._fleet, self._device, self._registry, self._keeper)
        self._p2p_store: object = self._sources  # callers set it to None: peers cannot read this rank then

    def _enter(self, fleet: Fleet) -> None:
        """A world: what is kept for as long as this server is part of it."""
        self._fleet = fleet
        self._gatherer = Gatherer(fleet, self._device, self._settings)
        self._keeper = Keeper(fleet, self._device)
        self._sources = Sources(fleet, self._settings)
        parts = (fleet, self._device, self._keeper, self._gatherer, self._registry, self._served)
        begins = lambda links: self.watch.follow(links)  # noqa: E731
        self._updater, self._receivers = Updater(*parts), Receivers(*parts, self._sources, self._settings, begins)

    def regroup(self, *, rank: int, world_size: int, master_addr: str | None = None, master_port: int | None = None) -> None:
        """Leave this world for another one, and take along what is registered: after a server was lost, or when it is back.

        Every member of the new world calls this, or makes a ParameterServer, with the same master_addr and master_port, which
        must not be this world's. Returns at once; the first collective call meets the others. What was gathered is forgotten:
        call gather_metas anew. Peers that read this rank are cut off. The accelerator stays the same, whatever the new rank is.

        Raises SettingsError, UpdateInProgressError.
        """
        fleet = Fleet(rank, world_size, self._settings, master_addr, master_port)
        if world_size > 1 and fleet.master == self._fleet.master:
            raise SettingsError("a new world needs another MASTER_ADDR or MASTER_PORT: the old world's store may be there still")
        with self._alone():
            taken_from = self._p2p_store is None
            self._leave()
            self._rank, self._world_size = rank, world_size
            self._enter(fleet)
            self._p2p_store = None if taken_from else self._sources
            self.watch.enter(self._fleet, self._keeper)

    def _leave(self) -> None:
        with contextlib.ExitStack() as stack:  # each, whatever the others raise
            stack.callback(self._fleet.close)
            stack.callback(self._keeper.close)
            stack.callback(self._receivers.close)
            stack.callback(self._sources.close)

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

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Raises UpdateInProgressError."""
        if not self._updating.acquire(blocking=False):
            raise UpdateInProgressError(f"rank {self._rank} is updating already; one update at a time")
        try:
            yield
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

    # --- life ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give everything back: device memory, checkpoints, links. The default group stays the caller's."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._registry.close)
            stack.callback(self._leave)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _register_memory(self, region: Any) -> None:
        self._registered_memory[id(region)] = self._device.register_host(region.tensor)

    def _unregister_memory(self, region: Any) -> None:
        self._registered_memory.pop(id(region)).close()
