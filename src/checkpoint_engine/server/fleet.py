"""This rank's place among the servers: store, links and communicator, made when first needed and kept."""

from __future__ import annotations

import contextlib
import datetime
import os
import queue
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from checkpoint_engine.devices.base import Closing, Device
from checkpoint_engine.errors import DeadlineError, PeerLostError, SettingsError, UpdateError
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.collective import StreamCollective, join
from checkpoint_engine.transport.links import Links
from checkpoint_engine.transport.meeting import LEADER, NotMetError, local_address

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

LOOK_AGAIN_SECONDS = 10.0
"""Longest time in which a rank that found nobody looks for rank 0's store again."""


class Fleet(Closing):
    """master_addr, master_port: None means MASTER_ADDR and MASTER_PORT. The store listens on the port after it, because
    the launcher's own store has that one. A world of one needs neither."""

    def __init__(self, rank: int, world_size: int, settings: Settings, master_addr: str | None, master_port: int | None) -> None:
        if not 0 <= rank < world_size:
            raise SettingsError(f"rank {rank} is not in a world of {world_size}")
        self.rank, self.world_size, self._settings = rank, world_size, settings
        self._master_addr, self._master_port = master_addr, master_port
        self._store: Store | None = None
        self._links: Links | None = None
        self._groups = 0

    @property
    def master(self) -> tuple[str, int] | None:
        """Where rank 0's store is; None: nowhere, which a world of one may do."""
        try:
            return self._master()
        except SettingsError:
            return None

    def _master(self) -> tuple[str, int]:
        addr = self._master_addr or os.environ.get("MASTER_ADDR")
        port = self._master_port if self._master_port is not None else os.environ.get("MASTER_PORT")
        if not addr or port is None:
            raise SettingsError(f"{self.world_size} ranks need master_addr and master_port, or MASTER_ADDR and MASTER_PORT")
        try:
            return addr, int(port)
        except ValueError:
            raise SettingsError(f"MASTER_PORT={port!r} is not a number") from None

    @property
    def store(self) -> Store:
        """Raises DeadlineError when rank 0 does not serve it in time."""
        if self._store is None:
            if self.world_size == 1:
                self._store = dist.HashStore()  # type: ignore[attr-defined]
            else:
                self._store = self._connect(is_master=self.rank == LEADER)
        return self._store

    def _connect(self, *, is_master: bool) -> Store:
        addr, port = self._master()
        seconds = self._settings.join_timeout
        try:
            return dist.TCPStore(  # type: ignore[attr-defined]
                addr, port + 1, is_master=is_master, timeout=datetime.timedelta(seconds=seconds), wait_for_workers=False
            )
        except RuntimeError as e:
            reason = str(e).splitlines()[0]
            raise DeadlineError(f"the store of rank {LEADER} at {addr}:{port + 1} ({reason})", seconds) from e

    @property
    def address(self) -> str:
        """Of the interface by which the other ranks reach this one."""
        return local_address(*self._master())

    @property
    def links(self) -> Links:
        if self._links is None:
            if self.world_size == 1:
                self._links = Links(0, 1, None, "", self._settings)
            else:
                self._links = self._meet()
        return self._links

    def _meet(self) -> Links:
        """A store that cannot be reached any more, or knows addresses at which nobody is, may be that of a world before this one,
        which rank 0 is just closing: then this rank looks for the new one."""
        deadline = time.monotonic() + min(LOOK_AGAIN_SECONDS, self._settings.join_timeout)
        while True:
            store = dist.PrefixStore("checkpoint-engine/links", self.store)  # type: ignore[attr-defined]
            try:
                return Links(self.rank, self.world_size, store, self.address, self._settings)
            except NotMetError:
                if time.monotonic() > deadline:
                    raise
                self._store = None
                time.sleep(0.1)

    def collective(self, device: Device, generation: int) -> StreamCollective | None:
        """Communicator number `generation`: all ranks must ask for the same one. None in a world of one.

        Raises PeerLostError as soon as a rank is gone, UpdateError when one says that it failed, DeadlineError when one does
        not come.
        """
        if self.world_size == 1:
            return None
        return self._joined(device, str(generation), range(self.world_size))

    def group(self, device: Device, generation: int, number: int, members: Sequence[int]) -> StreamCollective:
        """Sub-group number `number` of that communicator; its members, of which this rank is one, must all ask for it. Raises as
        `collective`."""
        group = self._joined(device, f"{generation}/{number}", members)
        group.members = tuple(members)
        return group

    def _joined(self, device: Device, place: str, members: Sequence[int]) -> StreamCollective:
        """place: in the store, which nothing else may have used."""
        made: queue.SimpleQueue[StreamCollective | BaseException] = queue.SimpleQueue()
        gone = threading.Event()  # nobody waits any more
        # Joining blocks inside a library. A thread of its own leaves this one free to hear who died or cannot come.
        threading.Thread(target=self._join, args=(device, place, members, made, gone), name="join", daemon=True).start()
        try:
            return self._await_joined(made)
        except BaseException:
            gone.set()
            _close_unclaimed(made)
            raise

    def _await_joined(self, made: queue.SimpleQueue[StreamCollective | BaseException]) -> StreamCollective:
        deadline = time.monotonic() + self._settings.join_timeout + 1
        while True:
            try:
                result = made.get(timeout=0.05)
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise DeadlineError("all ranks to join the communicator", self._settings.join_timeout) from None
            else:
                if isinstance(result, StreamCollective):
                    return result
                self._blame(1.0)
                raise result
            self._blame(0.0)

    def _join(
        self,
        device: Device,
        place: str,
        members: Sequence[int],
        made: queue.SimpleQueue[StreamCollective | BaseException],
        gone: threading.Event,
    ) -> None:
        try:
            device.bind_thread()
            # A client of its own: waiting in it holds up all others that use it, also after this was given up.
            client = self._connect(is_master=False)
            store = dist.PrefixStore(f"checkpoint-engine/collective/{place}", client)  # type: ignore[attr-defined]
            made.put(
                join(
                    device,
                    rank=members.index(self.rank),
                    world_size=len(members),
                    store=store,
                    address=self.address,
                    settings=self._settings,
                )
            )
        except BaseException as e:  # raised again by whoever waits
            made.put(e)
        if gone.is_set():
            _close_unclaimed(made)

    def _blame(self, seconds: float) -> None:
        """Raises PeerLostError if some rank's link breaks within `seconds`, UpdateError if some rank says that it failed:
        the cause of most other errors."""
        deadline = time.monotonic() + seconds
        while not (lost := self.links.lost) and not self.links.failure and time.monotonic() < deadline:
            time.sleep(0.01)
        if failure := self.links.failure:
            raise UpdateError(rank=failure.rank, host=failure.host, stage=failure.stage, reason=failure.reason)
        for rank, reason in lost.items():
            raise PeerLostError(f"the server of rank {rank}", reason)

    def init_default_group(self, backend: str, timeout: datetime.timedelta) -> None:
        """torch's default group, for callers that use it; no weights move on it."""
        self._groups += 1
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"default-group/{self._groups}", self.store),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
        )

    def close(self) -> None:
        if self._links is not None:
            self._links.close()
        self._links = self._store = None


class SubFleet(Fleet):
    """Some ranks of a world as a world of their own; they meet at the world's store, and need no other rank of it."""

    def __init__(self, world: Fleet, ranks: Sequence[int], settings: Settings) -> None:
        super().__init__(ranks.index(world.rank), len(ranks), settings, None, None)
        self._world, self._place = world, f"ranks/{'-'.join(map(str, ranks))}"

    def _connect(self, *, is_master: bool) -> Store:
        return dist.PrefixStore(self._place, self._world._connect(is_master=False))  # type: ignore[attr-defined]

    def _master(self) -> tuple[str, int]:
        return self._world._master()


def _close_unclaimed(made: queue.SimpleQueue[StreamCollective | BaseException]) -> None:
    with contextlib.suppress(queue.Empty):
        if isinstance(late := made.get_nowait(), StreamCollective):
            late.close()
