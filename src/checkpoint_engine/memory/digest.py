"""The digest of a tensor's bytes, in one place so that it can be replaced as a whole."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import xxhash

from checkpoint_engine.memory.region import HostRegion


def content_digest(data: memoryview | bytes) -> int:
    """64 bits of `data`, never 0, which means that no digest was made. Lets other threads run meanwhile."""
    return xxhash.xxh3_64_intdigest(data) or 1


class Span:
    """`nbytes` bytes of `region` from `offset` on, which hold one tensor, and their digest once it is made."""

    __slots__ = ("digest", "nbytes", "offset", "pending", "region")

    def __init__(self, region: HostRegion, offset: int, nbytes: int) -> None:
        self.region, self.offset, self.nbytes = region, offset, nbytes
        self.digest, self.pending = 0, 0


class Digests:
    """Makes each tensor's digest in the thread that brings its last bytes, while they are still in a cache."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._lock = threading.Lock()

    def expect(self, spans: Sequence[Span]) -> None:
        """One more piece of work brings bytes of `spans`. All calls come before the first `arrived`."""
        for span in spans:
            span.pending += 1

    def arrived(self, spans: Sequence[Span]) -> None:
        """One of the announced pieces of work has brought its bytes."""
        if not self.enabled:
            return
        with self._lock:
            for span in spans:
                span.pending -= 1
            whole = [span for span in spans if span.pending == 0]
        for span in whole:
            self.make(span)

    def make(self, span: Span) -> None:
        if self.enabled:
            span.digest = content_digest(span.region.view(span.offset, span.nbytes))
