"""How long a plan takes: the pipeline of lift, share and load as recurrences over the pieces of a plan.

A model to choose between plans and to size clusters, not a stopwatch: every rank is alike and nothing else uses the
links. Plain floating-point arithmetic in a fixed order, so every rank computes the same number.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from checkpoint_engine.planning.plan import Plan


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What the stages can do. Bytes per second; latencies in seconds.

    lift             host to device, of one rank
    share            a broadcast, once it flows; with `copies`, a copy from one rank to another
    load             the engine's copies out of a bucket
    lift_latency     more for every piece lifted
    share_latency    more for every piece shared
    hop_latency      more for every rank that a piece passes in the ring of ranks, before the next one can begin: see predict
    load_latency     more for every bucket loaded: two messages and a call
    load_per_tensor  more for every tensor loaded
    copies           owners copy pieces to the other ranks, each over a link of its own; else all broadcast in turn
    """

    lift: float
    share: float
    load: float
    lift_latency: float = 0.0
    share_latency: float = 0.0
    hop_latency: float = 0.0
    load_latency: float = 0.0
    load_per_tensor: float = 0.0
    copies: bool = False


# Measured on 4 x H200 with NVLink: copies from pinned memory 55 GB/s; broadcasts of 16, 64 and 256 MiB at 176, 297 and
# 344 GB/s, which is 359 GB/s after 40 us; vLLM's load_weights 60 us a tensor. How the 40 us divide into a fixed part and
# hops is assumed, and so is the latency of a message to the worker.
H200 = Rates(
    lift=55e9, share=359e9, load=1.7e12,
    lift_latency=10e-6, share_latency=30e-6, hop_latency=3.3e-6, load_latency=200e-6, load_per_tensor=60e-6,
)  # fmt: skip

# The same within one host, by peer copies: 380 GB/s between two H200s, and 100 us in which both sides see the end.
H200_HOST = msgspec.structs.replace(H200, share=380e9, share_latency=100e-6, hop_latency=0.0, copies=True)

# Two cores: memcpy 10 GB/s, gloo 3 GB/s between two ranks.
CPU = Rates(
    lift=10e9, share=3e9, load=10e9,
    lift_latency=50e-6, share_latency=200e-6, hop_latency=100e-6, load_latency=300e-6, load_per_tensor=20e-6,
)  # fmt: skip


class Prediction(NamedTuple):
    """Seconds: of the whole pass, and how long each stage is busy in it (of the owners, the one that lifts longest).

    bound_by  the busiest stage: "lift", "share" or "load"; "order" when all of them wait for one another most of the
              time, as when owners hold whole runs of layers and lift one after the other
    """

    seconds: float
    lift: float
    share: float
    load: float
    bound_by: str


def predict(plan: Plan, rates: Rates, world_size: int, *, staging: int = 2) -> Prediction:
    """Predict one pass of `plan` over `world_size` ranks, each of which loads every bucket.

    An owner lifts its pieces in the plan's order, at most `staging` of them ahead of their sharing (0: it lifts straight
    into the ring, which must be free). Shares follow one another in the order of `plan.stream` on all ranks, and each waits
    until its place is free. Buckets are loaded one after the other, each when its last piece is shared.

    A broadcast runs around the ring of ranks, in the order of their numbers, a hop later on each. An owner can send when its
    own part in the last broadcast is over: as many hops late as it is behind the last owner, so owners in turn lose one each.
    """
    lift_free: dict[int, float] = defaultdict(float)  # owner -> when its last lift ends
    lift_busy: dict[int, float] = defaultdict(float)
    waiting: dict[int, deque[float]] = defaultdict(deque)  # owner -> when each of its staging slots is free again
    arrived: dict[int, float] = defaultdict(float)  # bucket -> when what has been shared of it is on all ranks
    loaded: list[float] = []  # bucket -> when it is loaded
    load_free = load_busy = 0.0
    staged = staging > 0 and world_size > 1
    shares = _Copies(rates, world_size) if rates.copies else _Broadcasts(rates, world_size)

    def load(index: int) -> None:
        nonlocal load_free, load_busy
        items = plan.buckets[index].items
        seconds = rates.load_latency + rates.load_per_tensor * len(items) + sum(i.nbytes for i in items) / rates.load
        load_busy += seconds
        load_free = max(load_free, arrived[index]) + seconds
        loaded.append(load_free)

    for index, number in plan.stream:
        bucket = plan.buckets[index]
        piece = bucket.pieces[number]
        owner, slots = piece.owner, waiting[piece.owner]
        ring_free = loaded[bucket.after] if bucket.after >= 0 else 0.0
        may_lift = ring_free if not staged else slots.popleft() if len(slots) == staging else 0.0
        seconds = rates.lift_latency + piece.nbytes / rates.lift
        lift_busy[owner] += seconds
        lift_free[owner] = max(lift_free[owner], may_lift) + seconds
        shared = shares.share(owner, piece.nbytes, max(lift_free[owner], ring_free))
        arrived[index] = max(arrived[index], shared)
        if staged:
            slots.append(shared)
        if number + 1 == len(bucket.pieces):
            load(index)
    for index in range(len(loaded), len(plan.buckets)):  # without pieces
        load(index)
    last = shares.last if plan.stream else 0.0
    return _conclude(load_free + last, max(lift_busy.values(), default=0.0), shares.busy + last, load_busy)


class _Broadcasts:
    """One after the other on all ranks. last: how much later the last one ends on the last rank. busy: seconds at work."""

    def __init__(self, rates: Rates, world_size: int) -> None:
        self._rates, self._world_size = rates, world_size
        self._free, self._last_owner = 0.0, -1
        self.busy, self.last = 0.0, rates.hop_latency * (world_size - 1)

    def share(self, owner: int, nbytes: int, ready: float) -> float:
        """When bytes that are there from `ready` on are on all ranks."""
        rates = self._rates
        hops = (owner - self._last_owner) % self._world_size * rates.hop_latency if self._last_owner >= 0 else 0.0
        self._last_owner = owner
        seconds = rates.share_latency + nbytes / rates.share if self._world_size > 1 else 0.0
        self.busy += hops + seconds
        self._free = max(self._free + hops, ready) + seconds
        return self._free


class _Copies:
    """Of each owner one after the other, of different owners side by side. As _Broadcasts; busy: of who copies most."""

    last = 0.0

    def __init__(self, rates: Rates, world_size: int) -> None:
        self._rates, self._receivers = rates, world_size - 1
        self._free: dict[int, float] = defaultdict(float)
        self._busy: dict[int, float] = defaultdict(float)

    @property
    def busy(self) -> float:
        return max(self._busy.values(), default=0.0)

    def share(self, owner: int, nbytes: int, ready: float) -> float:
        seconds = self._receivers * nbytes / self._rates.share
        self._busy[owner] += seconds
        self._free[owner] = max(self._free[owner], ready) + seconds
        # Polling for room and for the end delays the arrival, not the next copy.
        return self._free[owner] + (self._rates.share_latency if self._receivers else 0.0)


def _conclude(seconds: float, lift: float, share: float, load: float) -> Prediction:
    busiest, busy = max((("lift", lift), ("share", share), ("load", load)), key=lambda stage: stage[1])
    return Prediction(seconds, lift, share, load, busiest if 2 * busy >= seconds else "order")


class PullRates(msgspec.Struct, frozen=True, kw_only=True):
    """What pulling can do. Bytes per second; seconds.

    gather   copy engine and kernel together, out of registered host memory, one rank alone
    memory   all of a host's ranks together
    latency  of a pull, besides its bytes
    """

    gather: float
    memory: float
    latency: float = 0.0


# Measured on one H200: qwen3-8b gathered at 55.3 GB/s, 10 ms besides; on two of a host with slower links 46 to 51 each. How much
# eight GPUs read together was not measured: two sockets with eight channels of DDR5-4800 have 614 GB/s in theory, of which
# a third is assumed.
H200_PULL = PullRates(gather=54e9, memory=200e9, latency=10e-3)


def predict_pull(reads: Sequence[int], rates: PullRates) -> float:
    """Seconds of an update in which every rank of one host reads its own bytes (`reads`, one number a rank) from host memory."""
    return rates.latency + max(max(reads, default=0) / rates.gather, sum(reads) / rates.memory)


def predict_replayed(plan: Plan, rates: Rates, world_size: int, *, staging: int = 2) -> Prediction:
    """`predict`, with workers that replay their loads: what a tensor costs in the engine's loader is gone."""
    return predict(plan, msgspec.structs.replace(rates, load_per_tensor=0.0), world_size, staging=staging)
