"""The reader's side, whatever the implementation: reads, their pieces, and the lanes that carry them.

A lane is a thread with a connection of its own. The lanes of a peer take pieces from one queue, so that a slow one takes fewer.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, TransferError
from checkpoint_engine.transport.peer.base import Deadline, Destination, Outcome, Peer, ReadOp, RegionOffer

GRACE = 2.0
"""Seconds that a read which failed or is late gives its lanes to end, before its destination is in quarantine."""

_held: set[Read] = set()
"""Reads that may still write: they keep their destinations' memory alive, for as long as the process lives if need be."""
_holding = threading.Lock()


def release_settled() -> None:
    """Let go of the memory of reads that are over by now."""
    with _holding:
        _held.difference_update([read for read in _held if read.settled])


def quarantined_bytes() -> int:
    """Bytes of this process's memory that cannot be used or given back, because a read that was given up may write there."""
    release_settled()
    with _holding:
        held = {read.destination.address: read.destination.nbytes for read in _held}
    return sum(held.values())


class Read:
    """A read under way. Everybody who uses it may be in another thread.

    failed   it raised, or was given up
    settled  nothing of it can be written any more
    """

    def __init__(self, owner: LanePeer, destination: Destination, ops: Sequence[ReadOp], deadline: Deadline) -> None:
        self.peer, self.destination, self.deadline = owner.name, destination, deadline
        self.nbytes = sum(op.nbytes for op in ops)
        self._owner = owner
        self._pieces = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._error: CheckpointEngineError | None = None

    def expect(self, pieces: int) -> None:
        self._pieces = pieces
        if not pieces:
            self._over.set()

    def landed(self) -> None:
        """A lane: one piece is there, and confirmed."""
        with self._lock:
            self._pieces -= 1
            if self._pieces == 0 and self._error is None:
                self._over.set()
                self._owner.forget(self)

    def fail(self, error: CheckpointEngineError) -> None:
        with self._lock:
            if not self._over.is_set():
                self._error = error
                with _holding:
                    _held.add(self)
                self._over.set()

    @property
    def failed(self) -> bool:
        return self._error is not None

    @property
    def settled(self) -> bool:
        return self._over.is_set() and (self._error is None or self._owner.quiet)

    def poll(self) -> bool:
        """Whether it is done; never blocks. Raises the error when it failed, DeadlineError when it is late."""
        if not self._over.is_set():
            if self.deadline.left:
                return False
            self._owner.fail(self._late())
        if self._error is not None:
            raise self._error
        return True

    def wait(self) -> None:
        """Until it is done. Raises, by the read's deadline and GRACE, DeadlineError, PeerLostError, RegionGoneError,
        ProtocolError or TransferError, all of which name the peer; the memory may hold anything then."""
        if not self._over.wait(self.deadline.left):
            self._owner.fail(self._late())
        if self._error is not None:
            self._owner.join(Deadline.after(GRACE))
            release_settled()
            raise self._error

    def cancel(self, seconds: float = GRACE) -> Outcome:
        """Give it up, and with it the connection to the source; of a read that is over, only tell what is known.

        Blocks for `seconds` at most. UNKNOWN: the destination is in quarantine.
        """
        if not self._over.is_set():
            self._owner.fail(TransferError(self.peer, "fetch", "the read was cancelled"))
        if self._error is not None:
            self._owner.join(Deadline.after(seconds))
            release_settled()
        return Outcome.QUIESCED if self.settled else Outcome.UNKNOWN

    def _late(self) -> DeadlineError:
        return DeadlineError(f"{self.nbytes} bytes from {self.peer}, stage fetch", self.deadline.seconds)


class Piece(NamedTuple):
    """What is asked for at once."""

    read: Read
    op: ReadOp

    @property
    def what(self) -> str:
        op = self.op
        return f"fetch, region {op.region} bytes [{op.offset}, {op.offset + op.nbytes})"


class Lane(ABC):
    """A thread of a peer's. It has ended when nothing that it began can be written any more; `unknown` says that this
    will never be known."""

    def __init__(self, owner: LanePeer, name: str) -> None:
        self.owner, self.unknown = owner, False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _run(self) -> None:
        try:
            self.carry()
        except CheckpointEngineError as e:
            self.owner.fail(e)
        except Exception as e:
            self.owner.fail(TransferError(self.owner.name, "fetch", f"{type(e).__name__}: {e}"))
        finally:
            self.wind_up()

    def open(self) -> None:  # noqa: B027
        """Before it carries anything: make ready. Raises what ends the connection."""

    @abstractmethod
    def carry(self) -> None:
        """Carry pieces until the peer has none any more. Raises what ends the connection."""

    @abstractmethod
    def interrupt(self) -> None:
        """From another thread: end soon. Never blocks."""

    def wind_up(self) -> None:  # noqa: B027
        """In the lane's thread, last: give up what it owns, after waiting for what was begun."""


class LanePeer(Peer):
    """A peer made of lanes; see base.Peer."""

    def __init__(self, name: str, address: tuple[str, int], regions: Sequence[RegionOffer], piece_bytes: int) -> None:
        """name, address: of the source. regions: those that are opened."""
        self.name = f"{name} at {address[0]}:{address[1]}"
        self._sizes = {region.region: region.nbytes for region in regions}
        self._piece_bytes = piece_bytes
        self._changed = threading.Condition()
        self._queue: collections.deque[Piece] = collections.deque()
        self._reads: set[Read] = set()
        self._error: CheckpointEngineError | None = None
        self._lanes: tuple[Lane, ...] = ()

    def start(self, lanes: Sequence[Lane]) -> None:
        self._lanes = tuple(lanes)
        for lane in lanes:
            lane.thread.start()

    def submit_read(self, destination: Destination, ops: Sequence[ReadOp], *, seconds: float) -> Read:
        for op in ops:
            self._check(op, destination)
        destination.check_idle("submit", unfinished=False)
        release_settled()
        read = Read(self, destination, ops, Deadline.after(seconds))
        pieces = [Piece(read, piece) for op in ops for piece in split(op, self._piece_bytes)]
        read.expect(len(pieces))
        with self._changed:
            if self._error is not None:
                raise TransferError(self.name, "submit", f"the connection has failed: {self._error}")
            destination.add(read)
            if pieces:
                self._reads.add(read)
                self._queue.extend(pieces)
                self._changed.notify_all()
        return read

    def _check(self, op: ReadOp, destination: Destination) -> None:
        size = self._sizes.get(op.region)
        if size is None:
            raise ValueError(f"{self.name} offered no region {op.region}, or it was not opened")
        if min(op.offset, op.nbytes, op.target) < 0 or op.offset + op.nbytes > size:
            raise ValueError(f"{op} is not inside the region's {size} bytes")
        if op.target + op.nbytes > destination.nbytes:
            raise ValueError(f"{op} is not inside the destination's {destination.nbytes} bytes")

    def take(self, *, block: bool) -> Piece | None:
        """A lane: the next piece. None when there is none now, or, if `block`, when there will be none any more."""
        with self._changed:
            while not self._queue:
                if not block or self._error is not None:
                    return None
                self._changed.wait()
            return self._queue.popleft()

    def forget(self, read: Read) -> None:
        with self._changed:
            self._reads.discard(read)

    def fail(self, error: CheckpointEngineError) -> None:
        """All reads under way, and the connection, end with `error`, unless another one was first. Never blocks."""
        with self._changed:
            if self._error is None:
                self._error = error
            first = self._error
            reads, self._reads = self._reads, set()
            self._queue.clear()
            self._changed.notify_all()
        for read in reads:
            read.fail(first)
        for lane in self._lanes:
            lane.interrupt()

    @property
    def quiet(self) -> bool:
        """Nothing can be written any more."""
        return not any(lane.thread.is_alive() or lane.unknown for lane in self._lanes)

    def join(self, deadline: Deadline) -> None:
        for lane in self._lanes:
            if lane.thread is not threading.current_thread():
                lane.thread.join(deadline.left)

    def close(self) -> None:
        self.fail(TransferError(self.name, "fetch", "this side closed the connection"))
        self.join(Deadline.after(GRACE))


def split(op: ReadOp, most: int) -> Iterator[ReadOp]:
    """`op` in pieces of at most `most` bytes; nothing for an empty one."""
    for start in range(0, op.nbytes, most):
        yield ReadOp(op.region, op.offset + start, min(most, op.nbytes - start), op.target + start)


@contextlib.contextmanager
def failing(lanes: Sequence[Lane]) -> Iterator[None]:
    """Connecting: when it raises, the lanes made so far are wound up."""
    try:
        yield
    except BaseException:
        for lane in lanes:
            lane.interrupt()
            lane.wind_up()
        raise
