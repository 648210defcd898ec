"""Typed messages, and descriptors beside them, over a connected stream socket. Every call has a deadline.

Frame: 4-byte little-endian length, then msgpack. Before the first frame each side sends a preamble (magic and protocol
version), so that a stranger or another version is told apart from a broken message.
"""

from __future__ import annotations

import array
import collections
import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.errors import NOT_DECODED, DeadlineError, PeerLostError, ProtocolError
from checkpoint_engine.transport.messages import PROTOCOL, Message

Incoming = TypeVar("Incoming")

MAGIC = b"ckpt"
PREAMBLE = struct.Struct("<4sI")
LENGTH = struct.Struct("<I")
MAX_FRAME = 256 << 20
"""Bytes. A manifest of 500 000 tensors fits; what announces more is refused before memory is taken for it."""
READ_BYTES = 64 << 10
MAX_DESCRIPTORS = 200
"""Beside one message; the kernel takes 253."""


class Channel(Closing, Generic[Incoming]):
    """One end of a connection to `peer` (a name for errors), receiving messages of type `incoming`.

    Several threads may send while another receives. `shutdown` ends them all from yet another.

    limit  bytes of a message that is taken; lower it until the peer has said who it is
    """

    limit = MAX_FRAME

    def __init__(self, sock: socket.socket, peer: str, incoming: type[Incoming], seconds: float) -> None:
        """Exchanges preambles. Raises ProtocolError, DeadlineError, PeerLostError; closes the socket then."""
        self.peer, self.socket = peer, sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)
        self._buffer = bytearray()
        self._descriptors: collections.deque[int] = collections.deque()
        self._sending = threading.Lock()
        sock.setblocking(False)
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._send(PREAMBLE.pack(MAGIC, PROTOCOL), (), seconds)
            self._check_preamble(seconds)
        except BaseException:
            self.close()
            raise

    def _check_preamble(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while len(self._buffer) < PREAMBLE.size:
            self._fill(deadline, seconds)
        magic, version = PREAMBLE.unpack_from(self._buffer)
        del self._buffer[: PREAMBLE.size]
        if magic != MAGIC:
            raise ProtocolError(f"{self.peer} does not speak this protocol (it began with {bytes(magic)!r})")
        if version != PROTOCOL:
            raise ProtocolError(f"{self.peer} speaks protocol version {version}, not {PROTOCOL}: install one release on both")

    def send(self, message: Message, descriptors: tuple[int, ...] = (), *, seconds: float) -> None:
        """Raises DeadlineError when the peer does not take it in time, PeerLostError when it is gone, ProtocolError when it
        is too long. A message that was cut off ends the conversation: what came after it could not be told apart."""
        body = self._encoder.encode(message)
        if len(body) > MAX_FRAME:
            raise ProtocolError(f"a {type(message).__name__} of {len(body)} bytes for {self.peer}; {MAX_FRAME} is the limit")
        self._send(LENGTH.pack(len(body)) + body, descriptors, seconds)

    def _send(self, data: bytes, descriptors: tuple[int, ...], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        if not self._sending.acquire(timeout=seconds):  # another thread's message is not taken either
            raise DeadlineError(f"{self.peer} to take a message", seconds)
        try:
            self._send_all(memoryview(data), descriptors, deadline, seconds)
        finally:
            self._sending.release()

    def _send_all(self, data: memoryview, descriptors: tuple[int, ...], deadline: float, seconds: float) -> None:
        rest = data
        while rest:
            try:
                if descriptors:
                    sent = socket.send_fds(self.socket, [rest], list(descriptors))
                    descriptors = ()
                else:
                    sent = self.socket.send(rest, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if not self._poll(select.POLLOUT, deadline):
                    if len(rest) < len(data):
                        self.shutdown()
                    raise DeadlineError(f"{self.peer} to take a message", seconds) from None
                continue
            except OSError as e:
                raise PeerLostError(self.peer, str(e)) from e
            rest = rest[sent:]

    def receive(self, *, seconds: float, waiting_for: str = "a message") -> Incoming:
        """The next message. Raises DeadlineError, PeerLostError, ProtocolError."""
        deadline = time.monotonic() + seconds
        while (message := self._next()) is None:
            self._fill(deadline, seconds, waiting_for)
        return message

    def poll(self) -> Incoming | None:
        """The next message if it is there, without blocking. Raises PeerLostError, ProtocolError."""
        while (message := self._next()) is None:
            if not self._read():
                return None
        return message

    def drain(self) -> Iterator[Incoming]:
        """All messages that are there, without blocking. Raises PeerLostError after the last one of a peer that is gone."""
        lost: PeerLostError | None = None
        try:
            while self._read():
                pass
        except PeerLostError as e:
            lost = e
        while (message := self._next()) is not None:
            yield message
        if lost is not None:
            raise lost

    def take_descriptors(self) -> tuple[int, ...]:
        """The descriptors that came beside the messages received so far; the caller owns them."""
        taken = tuple(self._descriptors)
        self._descriptors.clear()
        return taken

    def _next(self) -> Incoming | None:
        if len(self._buffer) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._buffer)
        if length > self.limit:
            raise ProtocolError(f"{self.peer} announced a message of {length} bytes; {self.limit} is the limit")
        end = LENGTH.size + length
        if len(self._buffer) < end:
            return None
        try:
            message = self._decoder.decode(memoryview(self._buffer)[LENGTH.size : end])
        except NOT_DECODED as e:
            raise ProtocolError(f"{self.peer} sent something that is not a message: {e}") from e
        del self._buffer[:end]
        return message

    def _fill(self, deadline: float, seconds: float, waiting_for: str = "its first words") -> None:
        if not self._read() and not self._poll(select.POLLIN, deadline):
            raise DeadlineError(f"{waiting_for} from {self.peer}", seconds)

    def _read(self) -> bool:
        """Append what is there to the buffer; False when nothing is."""
        try:
            unix = self.socket.family == socket.AF_UNIX
            data = self._read_with_descriptors() if unix else self.socket.recv(READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as e:
            raise PeerLostError(self.peer, str(e)) from e
        if not data:
            raise PeerLostError(self.peer)
        self._buffer += data
        return True

    def _read_with_descriptors(self) -> bytes:
        data, ancillary, _, _ = self.socket.recvmsg(READ_BYTES, socket.CMSG_SPACE(4 * MAX_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors = array.array("i")
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
                self._descriptors.extend(descriptors)
        return data

    def _poll(self, what: int, deadline: float) -> bool:
        poller = select.poll()
        try:
            poller.register(self.socket, what)
        except ValueError:  # closed meanwhile
            raise PeerLostError(self.peer, "this side closed the connection") from None
        return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))

    def fileno(self) -> int:
        return self.socket.fileno()

    def shutdown(self) -> None:
        """End the conversation: blocked senders and receivers, here and there, get PeerLostError."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shutdown()
        self.socket.close()
        for descriptor in self.take_descriptors():
            os.close(descriptor)
