"""Watching a server: events of its updates, its state, and how to end what it is doing."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from checkpoint_engine.devices.base import Device
from checkpoint_engine.errors import CheckpointNotFoundError
from checkpoint_engine.memory.registry import Registry
from checkpoint_engine.server.events import CANCELLED
from checkpoint_engine.server.fleet import Fleet
from checkpoint_engine.server.keeper import Keeper
from checkpoint_engine.server.report import UpdateReport
from checkpoint_engine.server.rollout import RolloutReport
from checkpoint_engine.transport.links import Links
from checkpoint_engine.transport.messages import Failure

log = logging.getLogger(__name__)
Report = UpdateReport | RolloutReport
R = TypeVar("R", UpdateReport, RolloutReport)


@dataclasses.dataclass(frozen=True, slots=True)
class Started:
    """A rollout, or one attempt to update, begins on this rank. version: None while it is the default."""

    checkpoint: str
    version: str | None
    rollout: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Moved:
    """A bucket of `nbytes` is complete on this rank."""

    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """The end of what the last Started with the same `rollout` began. Either a report or an error."""

    report: Report | None
    error: BaseException | None
    rollout: bool


Event = Started | Moved | Ended
Observer = Callable[[Event], None]


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointStatus:
    """This rank's part of a checkpoint; nbytes of its regions."""

    name: str
    nbytes: int
    tensors: int


@dataclasses.dataclass(frozen=True, slots=True)
class ServerStatus:
    """One rank. kept_bytes: host memory kept for the next checkpoint; ring_bytes: memory shared with the worker."""

    rank: int
    world_size: int
    host: str
    pid: int
    device: str
    checkpoints: tuple[CheckpointStatus, ...]
    kept_bytes: int
    ring_bytes: int

    @property
    def region_bytes(self) -> int:
        return sum(c.nbytes for c in self.checkpoints)


class Watch:
    """observers are called in the threads that do the work: they must be quick. What they raise is logged, no more."""

    def __init__(self, fleet: Fleet, device: Device, registry: Registry, keeper: Keeper) -> None:
        self._fleet, self._device, self._registry, self._keeper = fleet, device, registry, keeper
        self.observers: list[Observer] = []
        self._lock = threading.Lock()
        self._depth = 0
        self._running: tuple[Links, int] | None = None  # the update that runs: its links and its number on them
        self._reason: str | None = None  # why it is to end

    def enter(self, fleet: Fleet, keeper: Keeper) -> None:
        """The server is part of another world now."""
        self._fleet, self._keeper = fleet, keeper

    @contextlib.contextmanager
    def doing(self, checkpoint: str, version: str | None, *, rollout: bool, apart: bool = False) -> Iterator[Outcome]:
        """While an update or a rollout runs; its report goes into what is yielded. apart: `follow` says over which links."""
        outcome = Outcome()
        error: BaseException | None = None
        self._tell(Started(checkpoint, version, rollout))
        try:
            with self._lock:
                self._depth += 1
            if not rollout and not apart:
                self.follow(self._fleet.links)
            yield outcome
        except BaseException as e:
            error = e
            raise
        finally:
            with self._lock:
                self._depth -= 1
                if not rollout:
                    self._running = None
                if self._depth == 0:
                    self._reason = None
            self._tell(Ended(outcome.value, error, rollout))

    def follow(self, links: Links) -> None:
        """The update that runs begins with the next round of these links."""
        with self._lock:
            self._running, reason = (links, links.next_round("update")), self._reason
        if reason is not None:
            self._end(*self._running, reason)

    def moved(self, then: Callable[[int], None] | None) -> Callable[[int], None]:
        """A `progress` function that tells the observers, and `then`."""

        def tell(nbytes: int) -> None:
            self._tell(Moved(nbytes))
            if then is not None:
                then(nbytes)

        return tell

    def cancel(self, reason: str) -> bool:
        """Make what runs fail on all ranks, in stage "cancel", as any failure would; False: nothing runs.

        A rollout that has not reached its update yet fails when it does; one whose update is over is not stopped.
        """
        with self._lock:
            if self._depth == 0:
                return False
            self._reason, running = reason, self._running
        if running is not None:
            self._end(*running, reason)
        return True

    def _end(self, links: Links, number: int, reason: str) -> None:
        links.tell(Failure(number, links.rank, socket.gethostname(), CANCELLED, reason))

    def _tell(self, event: Event) -> None:
        for observer in tuple(self.observers):
            try:
                observer(event)
            except Exception:
                log.exception("an observer of updates raised")

    def status(self) -> ServerStatus:
        """Cheap: it looks at nothing but what is at hand."""
        held = []
        for name in self._registry.names():
            with contextlib.suppress(CheckpointNotFoundError):
                regions = self._registry[name].metas()
                held.append(CheckpointStatus(name, sum(r.nbytes for r in regions), sum(len(r.tensors) for r in regions)))
        fleet, device = self._fleet, self._device
        kept, ring = self._registry.kept_bytes, self._keeper.ring_bytes
        return ServerStatus(fleet.rank, fleet.world_size, socket.gethostname(), os.getpid(), device.uuid, tuple(held), kept, ring)

    @property
    def address(self) -> str:
        """Of the interface by which the other ranks reach this one."""
        return self._fleet.address

    def introduce(self, payload: bytes, seconds: float) -> tuple[bytes, ...]:
        """Collective: everybody's payload, in rank order. Raises as `store_based_barrier`."""
        return self._fleet.links.exchange("introduction", payload, seconds)


class Outcome:
    """Room for a report."""

    value: Report | None = None

    def keep(self, value: R) -> R:
        self.value = value
        return value
