"""This rank as a source: its regions, served from host memory to peers, and the metas by which they find them."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Sequence

import msgspec

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.errors import CheckpointBusyError, DeadlineError, ManifestError, SettingsError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.server.fleet import Fleet
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.peer.base import PeerOffer, PeerOptions, PeerTransport, RegionOffer, open_transport
from checkpoint_engine.transport.peer.rdma_devices import devices_for
from checkpoint_engine.transport.peer.server import PeerServer

log = logging.getLogger(__name__)
RDMA = ("mooncake", "nixl")


class Metas(Manifest, frozen=True, dict=True):
    """A manifest, and where each rank's regions can be read. Whoever has it can read them: offers hold tokens.

    offers  in rank order, the regions of each as in the manifest; None: that rank is not to be read
    """

    offers: tuple[PeerOffer | None, ...] = ()

    @property
    def distinct_bytes(self) -> int:
        """Of all tensors, each once, however many ranks hold it."""
        return sum({t.name: t.nbytes for rank in self.ranks for region in rank.regions for t in region.tensors}.values())

    def check(self) -> None:
        """Raises ManifestError when nobody can be read by it: it may come from a file."""
        if not any(self.offers):
            raise ManifestError(
                f"the metas of {self.checkpoint!r} name no rank that can be read: see CHECKPOINT_ENGINE_PEER_READS there"
            )
        if len(self.offers) != self.world_size or [rank.rank for rank in self.ranks] != list(range(self.world_size)):
            raise ManifestError(f"the metas of {self.checkpoint!r} are damaged: their ranks and offers do not fit together")


def peer_options(settings: Settings, address: str) -> PeerOptions:
    """For this process's transports. address: by which others reach it."""
    devices: tuple[str, ...] = ()
    if settings.peer_transport in RDMA:
        local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        devices = devices_for(*local)
    return PeerOptions(host=address, rdma_devices=devices)


class Sources(Closing):
    """Serves the regions of gathered checkpoints, from the first `offer` on. Threads share it.

    fleet: tells by which address other hosts reach this one
    """

    def __init__(self, fleet: Fleet, settings: Settings) -> None:
        self._name = f"rank {fleet.rank} ({socket.gethostname()})"
        self._fleet, self._settings = fleet, settings
        self._lock = threading.Lock()
        self._server: PeerServer | None = None
        self._owned = contextlib.ExitStack()
        self._broken = not settings.peer_reads
        self._served: dict[str, dict[int, RegionOffer]] = {}  # checkpoint -> the region's generation in this process -> offer

    @property
    def token(self) -> str | None:
        """Of this rank's offers; None when it has made none."""
        return None if self._server is None else self._server.offer().token

    @property
    def address(self) -> str:
        """By which others reach this rank."""
        return self._addresses()[0]

    def _addresses(self) -> list[str]:
        named = [word.strip() for word in self._settings.peer_hosts.split(",") if word.strip()]
        try:
            return named or [self._fleet.address]
        except (SettingsError, OSError):  # a world of one needs no master, and then nobody has said where it is
            return ["127.0.0.1"]

    def offer(self, name: str, regions: Sequence[HostRegion]) -> PeerOffer | None:
        """Serve them from now on, under the checkpoint's name; None when there are none, or nobody is to read from this rank.

        Raises CheckpointError when one is closed, SettingsError when a transport that the settings name is not installed.
        """
        if not regions or self._broken:
            return None
        with self._lock:
            server = self._open()
            if server is None:
                return None
            served = self._served.setdefault(name, {})
            for region in regions:
                if region.generation not in served:
                    served[region.generation] = server.add(region)
            return msgspec.structs.replace(server.offer(), regions=tuple(served[r.generation] for r in regions))

    def withdraw(self, name: str) -> None:
        """Serve none of them any more. Waits for peers that are reading.

        Raises CheckpointBusyError when one still is after settings.peer_wait; it can read to its end.
        """
        with self._lock:
            served = self._served.get(name, {})
            for generation, offer in list(served.items()):
                if self._server is not None:
                    try:
                        self._server.remove(offer, seconds=self._settings.peer_wait)
                    except DeadlineError as e:
                        raise CheckpointBusyError(name) from e
                del served[generation]
            self._served.pop(name, None)

    def _open(self) -> PeerServer | None:
        if self._server is None:
            hosts = self._addresses()
            transports = self._transports(hosts[0])
            try:
                self._server = self._owned.enter_context(PeerServer(self._name, hosts, transports))
            except OSError as e:  # an update does not need it
                log.warning("%s cannot be read by peers: it cannot listen on %s: %s", self._name, ", ".join(hosts), e)
                self._broken = True
        return self._server

    def _transports(self, host: str) -> list[PeerTransport]:
        """shm, and the one that the settings name: an RDMA engine takes seconds to start, and asks for no token."""
        kinds = ("shm", *(kind for kind in RDMA if kind == self._settings.peer_transport))
        options = peer_options(self._settings, host)
        return [self._owned.enter_context(open_transport(kind, options)) for kind in kinds]

    def close(self) -> None:
        """End all reads."""
        with self._lock:
            self._broken = True
            self._owned.close()
            self._server = None
