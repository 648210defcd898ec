"""The checkpoints of one server, by name."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from checkpoint_engine.errors import CheckpointBusyError, CheckpointError, CheckpointExistsError, CheckpointNotFoundError
from checkpoint_engine.manifest import RegionMeta
from checkpoint_engine.memory.checkpoint import HostCheckpoint, Progress, build
from checkpoint_engine.memory.digest import RegionSums
from checkpoint_engine.memory.pool import Hook, RegionPool
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.settings import Settings


def _ignore(region: object) -> None:
    pass


@dataclass
class _Entry:
    """checkpoint: None while it is being built. shared: its regions are kept for the next. users: see Registry.use."""

    shared: bool
    checkpoint: HostCheckpoint | None = None
    users: int = 0


@dataclass
class Received:
    """See Registry.receive. metas: what the regions hold."""

    regions: tuple[HostRegion, ...]
    metas: tuple[RegionMeta, ...] | None = None


class Registry:
    """Checkpoints by name. A context manager; threads may share it.

    settings                of which io_threads is used
    on_create, on_destroy, on_map   see RegionPool: a device registers each region's memory once
    sums                    makes digests of regions that on_create was called for
    """

    def __init__(
        self,
        settings: Settings,
        on_create: Hook = _ignore,
        on_destroy: Hook = _ignore,
        on_map: Hook = _ignore,
        sums: RegionSums | None = None,
    ) -> None:
        self._threads, self._sums = settings.io_threads, sums
        self._pool = RegionPool(on_create, on_destroy, on_map=on_map, threads=self._threads)
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._closed = False

    def register(
        self,
        name: str,
        *,
        files: Sequence[str | Path] | None = None,
        named_tensors: Mapping[str, torch.Tensor] | None = None,
        select: Collection[str] | None = None,
        use_shared_memory_pool: bool = False,
        use_inplace_pin_memory: bool = True,
        delete_inplace_files: bool = False,
        digests: bool = True,
        progress: Progress | None = None,
    ) -> HostCheckpoint:
        """Bring a checkpoint into host memory; see `checkpoint.build` for the arguments, and for what it raises besides
        CheckpointExistsError. No other checkpoint is touched, whatever happens.

        use_shared_memory_pool: use regions kept from an earlier checkpoint of the same shape, and keep this one's when it
        is unregistered.
        """
        entry = self._reserve(name, use_shared_memory_pool)
        try:
            checkpoint = build(
                name,
                files=files or (),
                named_tensors=named_tensors,
                select=select,
                pool=self._pool,
                threads=self._threads,
                inplace=use_inplace_pin_memory,
                reuse=use_shared_memory_pool,
                delete_inplace_files=delete_inplace_files,
                digests=digests,
                sums=self._sums,
                progress=progress,
            )
        except BaseException:
            with self._lock:
                del self._entries[name]
            raise
        with self._lock:
            entry.checkpoint = checkpoint
            if not self._closed:
                return checkpoint
            del self._entries[name]
        checkpoint.close()
        raise CheckpointError(f"the registry was closed while checkpoint {name!r} was registered")

    def _reserve(self, name: str, shared: bool) -> _Entry:
        with self._lock:
            if self._closed:
                raise CheckpointError("the registry is closed")
            if name in self._entries:
                raise CheckpointExistsError(name)
            self._entries[name] = _Entry(shared)
            return self._entries[name]

    @contextlib.contextmanager
    def receive(self, name: str, sizes: Sequence[int]) -> Iterator[Received]:
        """Memory for a checkpoint whose bytes come from elsewhere: regions of these sizes, with any contents.

        It is registered at the end when `metas` were given by then; else, and when the block raises, the memory is given
        back. Raises CheckpointExistsError, and CheckpointError when there is not enough memory.
        """
        entry = self._reserve(name, shared=False)
        regions: list[HostRegion] = []
        try:
            regions = self._pool.acquire_all(sizes)
            for region in regions:
                self._pool.ready(region)
            received = Received(tuple(regions))
            yield received
            with self._lock:
                if received.metas is not None and not self._closed:
                    entry.checkpoint = HostCheckpoint(name, regions, received.metas, self._pool)
        finally:
            if entry.checkpoint is None:
                with self._lock:
                    self._entries.pop(name, None)
                for region in regions:  # not kept: a read that was given up may still write there
                    self._pool.release(region, keep=False)

    def unregister(self, name: str, force: bool = False) -> None:
        """Forget a checkpoint. Its memory is given back, or kept if it was registered with use_shared_memory_pool.

        force: give all memory back, also what is kept from others. Raises CheckpointNotFoundError, and
        CheckpointBusyError while an update uses the checkpoint or it is still being registered.
        """
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                raise CheckpointNotFoundError(name)
            if entry.checkpoint is None or entry.users:
                raise CheckpointBusyError(name)
            del self._entries[name]
        entry.checkpoint.close(keep=entry.shared and not force)
        if force:
            self._pool.drop()

    def __getitem__(self, name: str) -> HostCheckpoint:
        """Raises CheckpointNotFoundError."""
        with self._lock:
            return self._find(name)[1]

    def __contains__(self, name: object) -> bool:
        with self._lock:
            entry = self._entries.get(name) if isinstance(name, str) else None
            return entry is not None and entry.checkpoint is not None

    def names(self) -> tuple[str, ...]:
        """Of all registered checkpoints, oldest first."""
        with self._lock:
            return tuple(name for name, entry in self._entries.items() if entry.checkpoint is not None)

    @property
    def kept_bytes(self) -> int:
        """Of memory that waits for the next checkpoint of the same shape."""
        return self._pool.kept_bytes

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[HostCheckpoint]:
        """The checkpoint, which cannot be unregistered meanwhile. Raises CheckpointNotFoundError."""
        with self._lock:
            entry, checkpoint = self._find(name)
            entry.users += 1
        try:
            yield checkpoint
        finally:
            with self._lock:
                entry.users -= 1
                abandoned = self._closed and entry.users == 0
            if abandoned:
                checkpoint.close()

    def close(self) -> None:
        """Give all memory back; that of a checkpoint in use when its last user is done. May be called twice."""
        with self._lock:
            self._closed = True
            idle = [e.checkpoint for e in self._entries.values() if e.checkpoint is not None and not e.users]
            self._entries = {name: e for name, e in self._entries.items() if e.checkpoint is None}
        for checkpoint in idle:
            checkpoint.close()
        self._pool.close()

    def _find(self, name: str) -> tuple[_Entry, HostCheckpoint]:
        entry = self._entries.get(name)
        if entry is None or entry.checkpoint is None:
            raise CheckpointNotFoundError(name)
        return entry, entry.checkpoint

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
