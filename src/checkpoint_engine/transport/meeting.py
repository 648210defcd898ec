"""How the servers of a world find each other: addresses and the fleet's secret over the store, then a TCP link a pair."""

from __future__ import annotations

import datetime
import hmac
import logging
import secrets
import socket
import time
from typing import TYPE_CHECKING

from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, PeerLostError, ProtocolError
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.channel import Channel
from checkpoint_engine.transport.messages import Introduce, OverLink

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

log = logging.getLogger(__name__)
LEADER = 0
LinkChannel = Channel[OverLink]


def local_address(master_addr: str, port: int) -> str:
    """The address of the interface by which this host reaches `master_addr`: where others reach this host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master_addr, port))  # sends nothing
        return str(probe.getsockname()[0])


def meet(rank: int, world_size: int, store: Store, address: str, settings: Settings) -> dict[int, LinkChannel]:
    """Connect this rank to all others: lower ranks listen, higher ranks connect, so that every pair has one link.

    address: of the interface by which the others reach this rank. Raises DeadlineError naming the ranks that did not come
    within settings.join_timeout, PeerLostError.
    """
    channels: dict[int, LinkChannel] = {}
    deadline = time.monotonic() + settings.join_timeout
    if rank == LEADER:
        store.set("secret", secrets.token_hex(16))
    with socket.create_server((address, 0), backlog=world_size) as server:
        store.set(f"link/{rank}", f"{address}:{server.getsockname()[1]}")
        secret = _look_up(store, "secret", LEADER, deadline, settings)
        try:
            for peer in range(rank):
                host, _, port = _look_up(store, f"link/{peer}", peer, deadline, settings).decode().rpartition(":")
                channels[peer] = _call(peer, (host, int(port)), Introduce(rank, secret), deadline, settings)
            while missing := set(range(world_size)) - {rank} - channels.keys():
                _accept(server, missing, channels, secret, deadline, settings)
        except BaseException:
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
        raise DeadlineError(f"rank {peer} to join the fleet ({str(e).splitlines()[0]})", settings.join_timeout) from e


def _call(peer: int, address: tuple[str, int], introduction: Introduce, deadline: float, settings: Settings) -> LinkChannel:
    try:
        sock = socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic()))
    except OSError as e:
        raise PeerLostError(f"rank {peer} at {address[0]}:{address[1]}", str(e)) from e
    channel: LinkChannel = Channel(sock, f"rank {peer}", OverLink, settings.connect_timeout)  # type: ignore[arg-type]
    channel.send(introduction, seconds=settings.connect_timeout)
    return channel


def _accept(
    server: socket.socket,
    missing: set[int],
    channels: dict[int, LinkChannel],
    secret: bytes,
    deadline: float,
    settings: Settings,
) -> None:
    """Take one connection; a stranger's is dropped, for it must not keep the fleet from meeting."""
    server.settimeout(max(0.1, deadline - time.monotonic()))
    try:
        sock, address = server.accept()
    except TimeoutError:
        raise DeadlineError(f"ranks {sorted(missing)} to join the fleet", settings.join_timeout) from None
    seconds = settings.connect_timeout
    try:
        channel: LinkChannel = Channel(sock, f"a server at {address[0]}", OverLink, seconds)  # type: ignore[arg-type]
    except CheckpointEngineError as e:
        log.warning("turned away a connection to the link port: %s", e)
        return
    try:
        first = channel.receive(seconds=seconds, waiting_for="an introduction")
        if not isinstance(first, Introduce) or not hmac.compare_digest(first.secret, secret) or first.rank not in missing:
            raise ProtocolError("not a member of this fleet")
    except CheckpointEngineError as e:
        log.warning("turned away %s: %s", channel.peer, e)
        channel.close()
        return
    channel.peer = f"rank {first.rank}"
    channels[first.rank] = channel
