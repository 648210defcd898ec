"""Pieces of work that fill host memory, done by a few threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

CHUNK_BYTES = 16 << 20
"""Size of one piece of work: large enough for a disk, small enough to spread over threads."""


class Work(NamedTuple):
    """run: brings `nbytes` bytes to where they belong; lets other threads run while it does."""

    run: Callable[[], None]
    nbytes: int


def do_all(shared: Iterable[Work], own: Iterable[Work], threads: int, done: Callable[[int], None]) -> None:
    """Do `shared` in `threads` threads and, meanwhile, `own` in the caller's. No thread is left when it returns or raises.

    done: called in the caller's thread with the bytes of each piece that is over. Raises what the first piece to fail
    raised; pieces not yet begun are then left undone.
    """
    executor = ThreadPoolExecutor(threads, "fill")
    try:
        futures = {executor.submit(work.run): work.nbytes for work in shared}
        for work in own:
            work.run()
            done(work.nbytes)
        for future in as_completed(futures):
            future.result()
            done(futures[future])
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
