"""Which buckets of a stream come to this rank."""

from __future__ import annotations

import itertools

from checkpoint_engine.errors import ProtocolError
from checkpoint_engine.planning.bits import pack_bits, unpack_bits
from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.planning.sharing import Shares


class Coming:
    """shares: None: all buckets come to all ranks.

    first   the first one's number; that of the plan's buckets where none comes
    bits    of all, for the worker (planning.bits); empty: all come
    stream  the plan's, without the pieces of buckets that do not come
    nbytes  of the tensors that come
    """

    def __init__(self, plan: Plan, shares: Shares | None, rank: int) -> None:
        count = len(plan.buckets)
        here = [shares is None or shares.takes_part(rank, bucket) for bucket in range(count)]
        self._here, self._shares = here, shares
        self._next = [count] * (count + 1)  # the first that comes, from each on
        for bucket in reversed(range(count)):
            self._next[bucket] = bucket if here[bucket] else self._next[bucket + 1]
        self.first = self._next[0]
        self.bits = b"" if all(here) else pack_bits(here)
        self.stream = plan.stream if all(here) else tuple(each for each in plan.stream if here[each[0]])
        self.nbytes = sum(itertools.compress(plan.sizes, here))

    def __contains__(self, bucket: int) -> bool:
        return self._here[bucket]

    def after(self, bucket: int) -> int:
        """The next one behind it, as `first`. Raises ProtocolError for a number that no bucket has: a worker may say any."""
        if bucket >= len(self._here):
            raise ProtocolError(f"the worker loaded bucket {bucket} of {len(self._here)}")
        return self._next[bucket + 1]

    def ranks(self, bucket: int) -> tuple[int, ...] | None:
        """Who takes part in it; None: all."""
        return None if self._shares is None else self._shares.ranks(bucket)


def check_needs(needs: bytes, buckets: int) -> None:
    """Raises ProtocolError when these are not one bit for each bucket. Empty: all."""
    try:
        if needs:
            unpack_bits(needs, buckets)
    except ValueError as e:
        raise ProtocolError(f"the worker says what it needs of {buckets} buckets: {e}") from None
