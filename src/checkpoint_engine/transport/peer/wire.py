"""Frames and raw bytes over one TCP connection between a reader and a source, every operation with a deadline.

Each side first sends a preamble (magic, version). Then frames: 4-byte little-endian length and msgpack; behind a `Bytes` frame
that many raw bytes. A frame's length is checked before memory is taken for it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Generic, TypeVar

import msgspec

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.errors import NOT_DECODED, DeadlineError, PeerLostError, ProtocolError
from checkpoint_engine.transport.messages import Message
from checkpoint_engine.transport.peer.base import Deadline

Incoming = TypeVar("Incoming")

MAGIC = b"ckpp"
VERSION = 1
PREAMBLE = struct.Struct("<4sI")
LENGTH = struct.Struct("<I")
TIMEVAL = struct.Struct("@ll")
FROM_READER = 4 << 10
"""Bytes of a frame that a source takes from a reader."""
FROM_SOURCE = 1 << 20
"""Bytes of a frame that a reader takes from a source; the largest carry an engine's metadata."""
SEND_BYTES = 4 << 20


# --- reader -> source -------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First. reader: who asks, for the source's messages."""

    token: str
    reader: str


class Open(Message, frozen=True):
    """Lease me this region; I will read it by implementation `kind`."""

    region: int
    generation: int
    kind: str


class Fetch(Message, frozen=True):
    """Send me bytes [offset, offset + nbytes) of a region that I have open."""

    region: int
    offset: int
    nbytes: int


class Confirm(Message, frozen=True):
    """Do my leases still hold? Also keeps the connection from being idle."""


# --- source -> reader -------------------------------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """The token is right."""


class Opened(Message, frozen=True):
    """The lease is yours until this connection ends. ticket: what the implementation must know."""

    region: int
    ticket: bytes


class Bytes(Message, frozen=True):
    """`nbytes` raw bytes follow."""

    nbytes: int


class Confirmed(Message, frozen=True):
    """They have held since they were given."""


class Refused(Message, frozen=True):
    """No, and this connection ends. gone: the region is not served, or another generation of it."""

    stage: str
    region: int
    reason: str
    gone: bool


FromReader = Hello | Open | Fetch | Confirm
FromSource = Welcome | Opened | Bytes | Confirmed | Refused


class Wire(Closing, Generic[Incoming]):
    """One end of a connection to `peer` (a name for errors). One thread at a time; `interrupt` ends it from another.

    All methods raise DeadlineError, PeerLostError and ProtocolError; `stage` is what they are waiting for, for messages.
    """

    def __init__(self, sock: socket.socket, peer: str, incoming: type[Incoming], limit: int, deadline: Deadline) -> None:
        """Exchanges preambles. Closes the socket when that fails."""
        self.peer, self.limit = peer, limit
        self._socket = sock
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)
        self._encoder = msgspec.msgpack.Encoder()
        try:
            sock.settimeout(None)  # the kernel keeps the time: see _limit
            _watch(sock)
            self._send_all(PREAMBLE.pack(MAGIC, VERSION), deadline, "connect")
            magic, version = PREAMBLE.unpack(self._exactly(PREAMBLE.size, deadline, "connect"))
        except OSError as e:
            self.close()
            raise e if isinstance(e, (DeadlineError, PeerLostError)) else PeerLostError(peer, f"stage connect: {e}") from e
        except BaseException:
            self.close()
            raise
        if magic != MAGIC or version != VERSION:
            self.close()
            wrong = f"began with {magic!r}" if magic != MAGIC else f"speaks version {version}, not {VERSION}"
            raise ProtocolError(f"{peer} does not speak this protocol (it {wrong})")

    def send(self, message: Message, deadline: Deadline, stage: str) -> None:
        body = self._encoder.encode(message)
        self._send_all(LENGTH.pack(len(body)) + body, deadline, stage)

    def receive(self, deadline: Deadline, stage: str) -> Incoming:
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size, deadline, stage))
        if length > self.limit:
            raise ProtocolError(f"{self.peer} announced a message of {length} bytes; {self.limit} is the limit")
        try:
            return self._decoder.decode(self._exactly(length, deadline, stage))
        except NOT_DECODED as e:
            raise ProtocolError(f"{self.peer} sent something that is not a message: {e}") from e

    def receive_into(self, view: memoryview, deadline: Deadline, stage: str) -> None:
        """Fill `view`. After this has returned or raised nothing is written to it any more."""
        done, size = 0, len(view)
        while done < size:
            self._limit(socket.SO_RCVTIMEO, deadline, stage)
            try:
                got = self._socket.recv_into(view[done:], 0, socket.MSG_WAITALL)
            except BlockingIOError:  # the kernel's time limit
                continue
            except OSError as e:
                raise PeerLostError(self.peer, f"stage {stage}: {e}") from e
            if not got:
                raise PeerLostError(self.peer, f"stage {stage}: its connection closed")
            done += got

    def send_bytes(self, view: memoryview, seconds: float, stage: str) -> None:
        """`seconds` are for the peer to take some of them, and begin anew whenever it has."""
        # Not sendfile: it spares the source a copy, but for memory in pages of 4 KiB it was slower in each of our
        # comparisons, and took the source more CPU (docs/peer.md). What it sends could change on its way, too.
        deadline = Deadline.after(seconds)
        while view:
            self._limit(socket.SO_SNDTIMEO, deadline, stage)
            try:
                sent = self._socket.send(view[:SEND_BYTES], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                continue
            except OSError as e:
                raise PeerLostError(self.peer, f"stage {stage}: {e}") from e
            view = view[sent:]
            deadline = Deadline.after(seconds)

    def interrupt(self) -> None:
        """End the connection: whoever waits in it, here or there, gets PeerLostError."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.interrupt()
        self._socket.close()

    def _exactly(self, nbytes: int, deadline: Deadline, stage: str) -> bytearray:
        data = bytearray(nbytes)
        self.receive_into(memoryview(data), deadline, stage)
        return data

    def _send_all(self, data: bytes, deadline: Deadline, stage: str) -> None:
        rest = memoryview(data)
        while rest:
            self._limit(socket.SO_SNDTIMEO, deadline, stage)
            try:
                rest = rest[self._socket.send(rest, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                continue
            except OSError as e:
                raise PeerLostError(self.peer, f"stage {stage}: {e}") from e

    def _limit(self, option: int, deadline: Deadline, stage: str) -> None:
        """Have the kernel end the next call in time: one call then waits and moves a whole piece, where polling would take two
        for each part of it that fits the socket's buffer."""
        left = deadline.left
        if not left:
            raise DeadlineError(f"{self.peer}, stage {stage}", deadline.seconds)
        seconds = int(left)
        limit = TIMEVAL.pack(seconds, max(1, int((left - seconds) * 1e6)))  # 0 would be no limit
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, option, limit)
        except OSError as e:
            raise PeerLostError(self.peer, f"stage {stage}: {e}") from e


def _watch(sock: socket.socket) -> None:
    """Have the kernel find out that the peer's host is gone, so that its leases end."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
