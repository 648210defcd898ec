"""How the servers of a world find each other: addresses and the fleet's secret over the store, then a TCP link a pair."""

from __future__ import annotations

import contextlib
import datetime
import hmac
import logging
import queue
import secrets
import socket
import threading
import time
from typing import TYPE_CHECKING

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, PeerLostError, ProtocolError
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.channel import Channel
from checkpoint_engine.transport.messages import Introduce, OverLink

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

log = logging.getLogger(__name__)
LEADER = 0
INTRODUCTION_BYTES = 1 << 10
"""More is not taken from who has not said the secret."""
EARLY_SECONDS = 0.05
"""Before a deadline, by which a wait is over for another reason."""
LinkChannel = Channel[OverLink]


class NotMetError(PeerLostError):
    """No rank was reached. The store, which had the addresses or broke, may be that of a world that has just ended."""


def local_address(master_addr: str, port: int) -> str:
    """The address of the interface by which this host reaches `master_addr`: where others reach this host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master_addr, port))  # sends nothing
        return str(probe.getsockname()[0])


def meet(rank: int, world_size: int, store: Store, address: str, settings: Settings) -> dict[int, LinkChannel]:
    """Connect this rank to all others: lower ranks listen, higher ranks connect, so that every pair has one link.

    address: of the interface by which the others reach this rank. Raises DeadlineError naming the ranks that did not come
    within settings.join_timeout, PeerLostError; NotMetError in a rank that looks for others and finds none.
    """
    channels: dict[int, LinkChannel] = {}
    deadline = time.monotonic() + settings.join_timeout
    if rank == LEADER:
        store.set("secret", secrets.token_hex(16))
    with socket.create_server((address, 0), backlog=world_size) as server:
        store.set(f"link/{rank}", f"{address}:{server.getsockname()[1]}")
        try:
            secret = _look_up(store, "secret", LEADER, deadline, settings)
            for peer in range(rank):
                host, _, port = _look_up(store, f"link/{peer}", peer, deadline, settings).decode().rpartition(":")
                channels[peer] = _call(peer, (host, int(port)), Introduce(rank, secret), deadline, settings)
            with _Door(server, secret, settings) as door:
                while missing := set(range(world_size)) - {rank} - channels.keys():
                    peer, channel = door.take(missing, deadline, settings.join_timeout)
                    channels[peer] = channel
        except BaseException as e:
            if not channels and rank != LEADER and isinstance(e, PeerLostError):
                raise NotMetError(e.peer, e.detail) from e
            for channel in channels.values():
                channel.close()
            raise
    return channels


def _look_up(store: Store, key: str, peer: int, deadline: float, settings: Settings) -> bytes:
    try:
        store.wait([key], datetime.timedelta(seconds=max(0.1, deadline - time.monotonic())))
        value: bytes = store.get(key)
        return value
    except RuntimeError as e:  # torch's store errors
        reason = str(e).splitlines()[0]
        if time.monotonic() < deadline - EARLY_SECONDS:
            raise PeerLostError(f"the store of rank {LEADER}", reason) from e
        raise DeadlineError(f"rank {peer} to join the fleet ({reason})", settings.join_timeout) from e


def _call(peer: int, address: tuple[str, int], introduction: Introduce, deadline: float, settings: Settings) -> LinkChannel:
    try:
        sock = socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic()))
    except OSError as e:
        raise PeerLostError(f"rank {peer} at {address[0]}:{address[1]}", str(e)) from e
    _watch(sock)
    channel: LinkChannel = Channel(sock, f"rank {peer}", OverLink, settings.connect_timeout)  # type: ignore[arg-type]
    try:
        channel.send(introduction, seconds=settings.connect_timeout)
    except BaseException:
        channel.close()
        raise
    return channel


def _watch(sock: socket.socket) -> None:
    """Have the kernel find out that the peer's host is gone: no word of it comes otherwise."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)


class _Door(Closing):
    """Takes connections until closed. A thread each: a stranger who says nothing keeps nobody from meeting."""

    def __init__(self, server: socket.socket, secret: bytes, settings: Settings) -> None:
        self._server, self._secret, self._seconds = server, secret, settings.connect_timeout
        self._came: queue.SimpleQueue[tuple[int, LinkChannel]] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="link-door", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, address = self._server.accept()
            except OSError as e:
                if not self._closed:
                    log.warning("cannot take a connection to the link port: %s", e)
                    time.sleep(0.1)  # out of descriptors, say
                continue
            threading.Thread(target=self._greet, args=(sock, address[0]), name="link-greeter", daemon=True).start()

    def _greet(self, sock: socket.socket, address: str) -> None:
        try:
            _watch(sock)
            channel: LinkChannel = Channel(sock, f"a server at {address}", OverLink, self._seconds)  # type: ignore[arg-type]
        except (CheckpointEngineError, OSError) as e:
            sock.close()
            log.warning("turned away a connection to the link port: %s", e)
            return
        try:
            channel.limit = INTRODUCTION_BYTES
            first = channel.receive(seconds=self._seconds, waiting_for="an introduction")
            if not isinstance(first, Introduce) or not hmac.compare_digest(first.secret, self._secret):
                raise ProtocolError("not a member of this fleet")
        except CheckpointEngineError as e:
            log.warning("turned away %s: %s", channel.peer, e)
            channel.close()
            return
        del channel.limit
        channel.peer = f"rank {first.rank}"
        self._came.put((first.rank, channel))

    def take(self, missing: set[int], deadline: float, seconds: float) -> tuple[int, LinkChannel]:
        """The next of `missing` to come. Raises DeadlineError after `seconds`, which end at `deadline`."""
        while True:
            try:
                rank, channel = self._came.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise DeadlineError(f"ranks {sorted(missing)} to join the fleet", seconds) from None
            if rank in missing:
                return rank, channel
            log.warning("turned away a second rank %d", rank)
            channel.close()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._thread.join(5)
