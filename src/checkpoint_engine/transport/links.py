"""The mesh of links between servers: agreement, news of failure, and notice of death.

Every pair of servers has one TCP connection, so the end of any process is known at once everywhere, whoever it was. One
thread reads them all. The store only hands out addresses and the fleet's secret.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import selectors
import socket
import threading
import time
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.errors import AgreementError, CheckpointEngineError, DeadlineError, PeerLostError, ProtocolError, said
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.meeting import LEADER, LinkChannel, meet
from checkpoint_engine.transport.messages import Failure, Give, Given, Goodbye, Introduce, Lost, OverLink, Stopped, Withdrawn

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

log = logging.getLogger(__name__)
LEFT = "it left in good order"
CROSSING_SECONDS = 1.0
"""How long a member that gives up waits for the leader's last word."""


class Inbox:
    """What one update hears: (rank, message), from other ranks and from this one."""

    def __init__(self, update: int) -> None:
        self.update = update
        self.failures: list[Failure] = []  # all that came, whether or not they were taken out
        self._queue: queue.SimpleQueue[tuple[int, object]] = queue.SimpleQueue()

    def put(self, rank: int, message: object) -> None:
        if isinstance(message, Failure):
            self.failures.append(message)
        self._queue.put((rank, message))

    def get(self, seconds: float) -> tuple[int, object] | None:
        """The next entry; None when there is none within `seconds`."""
        try:
            return self._queue.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None


class Links(Closing):
    """Links of server `rank` to all others. A world of one needs no store and makes none.

    Raises DeadlineError naming the rank that did not come within settings.join_timeout.
    """

    def __init__(self, rank: int, world_size: int, store: Store | None, address: str, settings: Settings) -> None:
        self.rank, self.world_size, self._settings = rank, world_size, settings
        self._channels: dict[int, LinkChannel] = {}
        self._lost: dict[int, str] = {}
        self._changed = threading.Condition()
        self._round = 0
        self._given: dict[int, dict[int, Give]] = {}
        self._answers: dict[int, Given | Withdrawn] = {}
        self._inboxes: dict[int, Inbox] = {}
        self._oldest = 0
        self._stopped: dict[int, int] = {}  # rank -> the last update that it stopped, with nothing of it under way
        self._closing = False
        if world_size > 1:
            if store is None:
                raise ProtocolError(f"a world of {world_size} ranks needs a store to meet at")
            self._channels = meet(rank, world_size, store, address, settings)
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        for peer, channel in self._channels.items():
            self._selector.register(channel, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._read, name="links", daemon=True)
        self._thread.start()

    # --- reading -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        for peer in self._channels:  # what came right behind an introduction is in the buffer already
            self._drain(peer)
        while not self._closing:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                self._drain(key.data)

    def _drain(self, peer: int) -> None:
        channel = self._channels[peer]
        try:
            with self._changed:  # what came together is seen together: not that a rank came, and later that it gave up since
                for message in channel.drain():
                    self._dispatch(peer, message)
        except Exception as e:  # of any kind: this thread reads for all the others
            self._selector.unregister(channel)
            channel.shutdown()  # the peer must hear that nobody listens to it any more
            self._lose(peer, said(e))

    def _dispatch(self, peer: int, message: OverLink) -> None:
        with self._changed:
            match message:
                case Give():
                    self._given.setdefault(message.round, {})[peer] = message
                case Given():
                    self._answers.setdefault(message.round, message)
                case Withdrawn():
                    self._answers.setdefault(message.round, message)
                case Goodbye():
                    self._lost.setdefault(peer, LEFT)
                case Introduce():
                    raise ProtocolError(f"rank {peer} introduced itself twice")
                case _:
                    if isinstance(message, Stopped) and message.posted >= 0:
                        self._stopped[peer] = max(message.update, self._stopped.get(peer, 0))
                    if message.update >= self._oldest:
                        self._inbox(message.update).put(peer, message)
            self._changed.notify_all()

    def _lose(self, peer: int, reason: str) -> None:
        with self._changed:
            reason = self._lost.setdefault(peer, reason)
            for inbox in self._inboxes.values():
                inbox.put(peer, Lost(peer, reason))
            self._changed.notify_all()

    # --- talking -----------------------------------------------------------------------------------------------------

    @property
    def lost(self) -> dict[int, str]:
        """Ranks whose link is gone, and why."""
        with self._changed:
            return dict(self._lost)

    def has_stopped(self, rank: int, update: int) -> bool:
        """Whether it has said, however late, that nothing which it began in update number `update` is under way any more."""
        with self._changed:
            return self._stopped.get(rank, 0) >= update

    @property
    def failure(self) -> Failure | None:
        """What another rank says of the update that is going on; only its inbox is kept."""
        with self._changed:
            return next((inbox.failures[0] for inbox in self._inboxes.values() if inbox.failures), None)

    def send(self, rank: int, message: OverLink) -> None:
        """To one rank; to this rank itself it goes straight to the inbox. Raises PeerLostError."""
        if rank == self.rank:
            self._dispatch(rank, message)
        elif rank in self.lost:
            raise PeerLostError(f"rank {rank}", self.lost[rank])
        else:
            self._channels[rank].send(message, seconds=self._settings.connect_timeout)

    def tell(self, message: OverLink, *, to_self: bool = True) -> None:
        """To all ranks that are left."""
        for rank in range(self.world_size):
            if rank != self.rank or to_self:
                with contextlib.suppress(PeerLostError, DeadlineError):
                    self.send(rank, message)

    @contextlib.contextmanager
    def inbox(self, update: int) -> Iterator[Inbox]:
        """Messages of update number `update`, those that came early included, and Lost for each rank that is gone. What
        comes for it later is dropped."""
        with self._changed:
            inbox = self._inbox(update)
            for rank, reason in self._lost.items():
                inbox.put(rank, Lost(rank, reason))
        try:
            yield inbox
        finally:
            with self._changed:
                self._oldest = max(self._oldest, update + 1)
                for old in [u for u in self._inboxes if u < self._oldest]:
                    del self._inboxes[old]

    def _inbox(self, update: int) -> Inbox:
        return self._inboxes.setdefault(update, Inbox(update))

    def next_round(self, what: str) -> int:
        """The number that the next `exchange` will have, on all ranks, if it is of `what`."""
        with self._changed:
            number = self._round + 1
            while self._was_alone(number, what):
                number += 1
            return number

    def exchange(self, what: str, payload: bytes, seconds: float, number: int | None = None) -> tuple[bytes, ...]:
        """Everybody's payload, in rank order. All ranks must call it in the same order with the same `what`. number: what
        `next_round` said.

        Raises PeerLostError naming a rank that is gone, DeadlineError naming those that did not come, AgreementError when
        another rank is doing something else or gave up. All ranks' rounds stay in step whatever happened.
        """
        with self._changed:
            self._round = number = self.next_round(what) if number is None else number
            for kept in (self._answers, self._given):  # what came too late for a round that was given up
                for late in [n for n in kept if n < number]:
                    del kept[late]
        mine = Give(number, what, payload)
        if self.rank == LEADER:
            self._dispatch(self.rank, mine)
            return self._collect(mine, seconds)
        self.send(LEADER, mine)
        return self._await_answer(mine, seconds)

    def _collect(self, mine: Give, seconds: float) -> tuple[bytes, ...]:
        deadline, number = time.monotonic() + seconds, mine.round
        everybody: set[int] = set(range(self.world_size))
        try:
            with self._changed:
                self._check_round(mine, {LEADER})
                while missing := everybody - set(self._given[number]):
                    self._check_round(mine, missing)
                    if not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                        raise DeadlineError(f"ranks {sorted(missing)} to reach {mine.what}", seconds)
                self._check_round(mine, {LEADER})
                parts = self._given[number]
            for rank, part in parts.items():
                if part.what != mine.what:
                    raise AgreementError(
                        f"rank {rank} is at {part.what}, rank {self.rank} at {mine.what}: call the same on all ranks"
                    )
        except CheckpointEngineError as e:
            self.tell(Withdrawn(number, str(e), mine.what), to_self=False)
            raise
        finally:
            with self._changed:
                self._given.pop(number, None)
        answer = Given(number, tuple(parts[r].payload for r in sorted(parts)))
        self.tell(answer, to_self=False)
        return answer.payloads

    def _was_alone(self, number: int, what: str) -> bool:
        """Whether the leader gave up this round in another call, to which this rank does not come: it had stood still, and ended
        the call before it, late, which the others had given up. It is past this round, and so must this rank be."""
        answer = self._answers.get(number)
        return isinstance(answer, Withdrawn) and answer.what not in ("", what)

    def _check_round(self, mine: Give, missing: Collection[int]) -> None:
        for rank in missing:
            if rank in self._lost:
                raise PeerLostError(f"rank {rank}", self._lost[rank])
        if isinstance(answer := self._answers.pop(mine.round, None), Withdrawn):
            # A member does not know whom else it waited for.
            raise AgreementError(f"{answer.reason} waiting for ranks {sorted(missing)} to reach {mine.what}")

    def _await_answer(self, mine: Give, seconds: float) -> tuple[bytes, ...]:
        deadline = time.monotonic() + seconds
        try:
            with self._changed:
                while mine.round not in self._answers:
                    if LEADER in self._lost:
                        raise PeerLostError(f"rank {LEADER}", self._lost[LEADER])
                    if not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                        raise DeadlineError(f"rank {LEADER} to reach {mine.what}", seconds)
                answer = self._answers.pop(mine.round)
        except DeadlineError:
            if (last := self._withdraw(mine.round, f"rank {self.rank} gave up after {seconds:.3g} s")) is None:
                raise
            answer = last
        if isinstance(answer, Withdrawn):
            raise AgreementError(answer.reason)
        return answer.payloads

    def _withdraw(self, number: int, reason: str) -> Given | Withdrawn | None:
        """Tell the leader. If it is there it answers, and knows who is not. Its answer may also have been on the way already:
        then the others go on, and so must this rank."""
        with contextlib.suppress(PeerLostError, DeadlineError):
            self.send(LEADER, Withdrawn(number, reason))
        with self._changed:
            self._changed.wait_for(lambda: number in self._answers or LEADER in self._lost, CROSSING_SECONDS)
            return self._answers.pop(number, None)

    def close(self) -> None:
        if self._closing:
            return
        self.tell(Goodbye(), to_self=False)
        self._closing = True
        self._wake.close()
        self._thread.join(5)
        self._woken.close()
        self._selector.close()
        for channel in self._channels.values():
            channel.close()
