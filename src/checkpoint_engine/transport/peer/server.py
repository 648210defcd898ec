"""The source's side: serves regions read-only over TCP, and leases them to readers of every implementation."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Sequence

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.transport.descriptors import whereabouts
from checkpoint_engine.transport.peer.base import PeerOffer, PeerTransport, RegionOffer
from checkpoint_engine.transport.peer.served import RegionTable, Served
from checkpoint_engine.transport.peer.serving import ServerLimits, Serving

log = logging.getLogger(__name__)


class PeerServer(Closing):
    """Serves regions from construction to `close`, with a thread for each connection.

    Reads need nothing of the owner. A region that somebody reads is not given up: see `remove`.
    """

    def __init__(
        self,
        name: str,
        hosts: Sequence[str],
        transports: Sequence[PeerTransport] = (),
        *,
        limits: ServerLimits | None = None,
        port: int = 0,
    ) -> None:
        """name: of this source, for readers' messages. hosts: addresses to listen on, one for each network interface that
        shall be read through, which readers can reach (not 0.0.0.0: the offer names them). transports: to be offered besides
        tcp; they stay the caller's.

        Raises OSError when an address cannot be listened on.
        """
        self.name = name
        self._limits = limits or ServerLimits()
        self._transports = {transport.kind: transport for transport in transports}
        self._token = secrets.token_urlsafe(24)
        self._table = RegionTable()
        self._lock = threading.Lock()
        self._readers: set[Serving] = set()
        self._closed = False
        with contextlib.ExitStack() as undo:
            self._doors = [undo.enter_context(_listen(host, port)) for host in hosts]
            undo.pop_all()
        self._threads = [threading.Thread(target=self._accept, args=(d,), name="peer-door", daemon=True) for d in self._doors]
        for thread in self._threads:
            thread.start()

    def offer(self) -> PeerOffer:
        """What a reader needs: this server and the regions that it serves now."""
        kinds = ("tcp", *(kind for kind in self._transports if kind != "tcp"))
        addresses = tuple((str(host), int(port)) for host, port, *_ in (door.getsockname() for door in self._doors))
        return PeerOffer(self.name, addresses, self._token, whereabouts(), kinds, self._table.offers())

    def add(self, region: HostRegion) -> RegionOffer:
        """Serve a region, whose bytes must not change until `remove` has returned.

        Raises CheckpointError when it is closed, SettingsError when the server is, and what an implementation raises.
        """
        served = self._table.prepare(region)
        exported: list[PeerTransport] = []
        try:
            for kind, transport in self._transports.items():
                served.tickets[kind] = transport.export(served)
                exported.append(transport)
            self._table.publish(served)
        except BaseException:
            _give_up(served, exported)
            raise
        return served.offer

    def remove(self, offer: RegionOffer, *, seconds: float) -> None:
        """Do not serve a region any more. Returns when nobody can read it; nothing happens when it is not served.

        Raises DeadlineError naming the readers that still have it open after `seconds`; it is then served as before.
        """
        served = self._table.withdraw(offer, seconds)
        if served is not None:
            _give_up(served, self._transports.values())

    def close(self) -> None:
        """End all connections, and with them all leases and reads. Raises DeadlineError when one does not end."""
        with self._lock:
            self._closed = True
        for door in self._doors:
            with contextlib.suppress(OSError):
                door.shutdown(socket.SHUT_RDWR)  # wakes accept
        for thread in self._threads:
            thread.join(5)
        for door in self._doors:
            door.close()
        with self._lock:
            readers = list(self._readers)
        for reader in readers:
            reader.interrupt()
        for reader in readers:
            reader.thread.join(5)
        for offer in self._table.close():
            self.remove(offer, seconds=5)

    def _accept(self, door: socket.socket) -> None:
        while not self._closed:
            try:
                sock, address = door.accept()
            except OSError as e:
                if not self._closed:
                    log.warning("%s cannot take a connection: %s", self.name, e)
                    time.sleep(0.1)  # out of descriptors, say
                continue
            reader = Serving(sock, address[0], self._table, self._token, self._limits, self._forget)
            if (reason := self._begin(reader)) is not None:
                sock.close()
                log.warning("%s turned away a reader at %s: %s", self.name, address[0], reason)

    def _begin(self, reader: Serving) -> str | None:
        """Why not, if not."""
        with self._lock:
            if self._closed:
                return "it is closing"
            if len(self._readers) >= self._limits.connections:
                return "too many connections"
            try:
                reader.thread.start()
            except RuntimeError as e:  # no thread to be had
                return str(e)
            self._readers.add(reader)
            return None

    def _forget(self, reader: Serving) -> None:
        with self._lock:
            self._readers.discard(reader)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)


def _give_up(served: Served, transports: Iterable[PeerTransport]) -> None:
    try:
        for transport in transports:
            transport.unexport(served)
    finally:
        os.close(served.fd)
