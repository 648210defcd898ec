"""The buckets that a server announced for a stream: exactly these must come, in their order."""

from __future__ import annotations

from collections.abc import Sequence

from checkpoint_engine.errors import ProtocolError
from checkpoint_engine.planning.bits import unpack_bits
from checkpoint_engine.transport.messages import Attach


class Coming:
    """coming: their numbers, rising, of `count` buckets. absent: all others."""

    def __init__(self, coming: Sequence[int], count: int) -> None:
        self._left, self._count = list(reversed(coming)), count
        self.absent = tuple(sorted(set(range(count)).difference(coming)))

    def came(self, bucket: int) -> None:
        """Raises ProtocolError when it is not the next one."""
        if not self._left or self._left.pop() != bucket:
            raise ProtocolError(f"the server sent bucket {bucket} of {self._count}, which was not the next one")

    def released(self) -> None:
        """Nothing further comes. Raises ProtocolError when something is missing."""
        if self._left:
            raise ProtocolError(f"the server ended its stream without bucket {self._left[-1]} of {self._count}")


def coming_of(attach: Attach, count: int) -> Coming:
    """count: of the plan's buckets. Raises ProtocolError when what was announced is not of this plan."""
    if not attach.coming:
        return Coming(range(count), count)
    try:
        return Coming(unpack_bits(attach.coming, count), count)
    except ValueError as e:
        raise ProtocolError(f"the server announced other buckets than its plan has: {e}") from None
