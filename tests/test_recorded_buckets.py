"""A load plan holds for a checkpoint in whatever buckets it comes, also several at a time, as devices pull them."""

from __future__ import annotations

from multiprocessing.synchronize import Barrier
from typing import Any, NamedTuple

import pytest

from checkpoint_engine.planning.mapped import grouped
from checkpoint_engine.server import mapped
from helpers.fleet import Handles, Worker, server, share_of
from helpers.ranks import _context, run_ranks
from helpers.recorded import Deed, checkpoint, engines, fresh

KIB = 1 << 10


class Step(NamedTuple):
    """together: how many buckets are pulled at a time."""

    method: str
    bucket_bytes: int
    together: int = 0


STEPS = (
    Step("broadcast", 8 * KIB),
    Step("broadcast", 1 << 20),
    Step("broadcast", 4 * KIB),
    Step("pull", 8 * KIB, 3),
    Step("pull", 8 * KIB),
    Step("pull", 8 * KIB, 100),
    Step("broadcast", 8 * KIB),
)


def _course(rank: int, world_size: int, crew: list[Worker], steps: tuple[Step, ...], ended: Barrier) -> list[Any]:
    seen = []
    for number, (method, bucket_bytes, together) in enumerate(steps):
        mapped.Grouping.of = lambda _, plan, n=together: grouped(plan, n * plan.bucket_bytes)  # type: ignore[method-assign]

        def ask(handles: Handles) -> None:
            crew[rank].ask("update", handles[rank][1], Deed())

        with server(method=method, bucket_bytes=bucket_bytes, verify="on") as ps:
            weights = checkpoint(number)
            ps.register_checkpoint("c", named_tensors=share_of(weights, rank, world_size))
            ps.gather_metas("c")
            report = ps.update("c", ask, version=f"v{number}")
            version, dirty, digests, _, _ = crew[rank].ask("state")
            right = digests == fresh(weights, rank, world_size)
            seen.append((report.method == "pull", report.ways, (version, dirty, right)))
        ended.wait(20)  # the next world's store has the same port: nobody may find this one's
    return seen


@pytest.mark.parametrize("steps", [STEPS, STEPS[::-1]], ids=["broadcast first", "pulled first"])
def test_one_plan_for_all_buckets(steps: tuple[Step, ...]) -> None:
    with engines(["", ""]) as crew:
        for seen in run_ranks(_course, 2, crew, steps, _context.Barrier(2)):
            sizes = [step.bucket_bytes for step in steps]
            for number, (_, ways, _) in enumerate(seen):  # other sizes may bring the tensors in another order
                known = ways == ("replayed",) if sizes[number] in sizes[:number] else ways in (("proved",), ("replayed",))
                assert known, number
            assert [good for _, _, good in seen] == [(f"v{number}", False, True) for number in range(len(steps))]
            assert all(
                pulled == (step.method == "pull")
                for (pulled, ways, _), step in zip(seen, steps, strict=True)
                if ways == ("replayed",)
            )
