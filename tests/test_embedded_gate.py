"""The gate between requests and sessions. Every step is awaited, none is timed."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.engines.embedded.gate import Gate, ThreadHold
from checkpoint_engine.errors import DeadlineError


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_writer_waits_for_readers_and_goes_before_later_ones() -> None:
    async def main() -> list[str]:
        gate, log, finish = Gate(), list[str](), asyncio.Event()

        async def read(name: str, until: asyncio.Event | None = None) -> None:
            async with gate.reading(10):
                log.append(name)
                if until:
                    await until.wait()
                    log.append(f"{name} ends")

        early = asyncio.create_task(read("early", finish))
        await _settle()
        writer = asyncio.create_task(gate.acquire_write(10))
        await _settle()
        late = asyncio.create_task(read("late"))
        await _settle()
        assert not writer.done() and gate.waiting == 1
        finish.set()
        await writer
        await early
        log.append("writes")
        await _settle()
        assert not late.done()
        gate.release_write()
        await late
        assert gate.readers == 0
        return log

    assert asyncio.run(main()) == ["early", "early ends", "writes", "late"]


def test_deadlines_leave_the_gate_usable() -> None:
    async def main() -> None:
        gate = Gate()
        async with gate.reading(1):
            with pytest.raises(DeadlineError, match="running requests"):
                await gate.acquire_write(0.01)
            async with gate.reading(1):  # the writer that gave up holds nobody back
                pass
        await gate.acquire_write(1)
        with pytest.raises(DeadlineError, match="update to end"):
            async with gate.reading(0.01):
                pass
        with pytest.raises(DeadlineError):
            await gate.acquire_write(0.01)
        gate.release_write()
        async with gate.reading(1):
            assert gate.readers == 1

    asyncio.run(main())


def test_readers_behind_a_writer_that_gives_up_go_on() -> None:
    async def main() -> None:
        gate = Gate()
        async with gate.reading(1):
            writer = asyncio.create_task(gate.acquire_write(10))
            await _settle()
            entered = asyncio.Event()

            async def read() -> None:
                async with gate.reading(10):
                    entered.set()

            late = asyncio.create_task(read())
            await _settle()
            writer.cancel()
            await entered.wait()
            await late

    asyncio.run(asyncio.wait_for(main(), 10))


def test_thread_hold() -> None:
    async def main() -> None:
        gate, loop = Gate(), asyncio.get_running_loop()

        def session() -> None:
            with ThreadHold(gate, loop, 10) as hold:
                hold.take()
                hold.take()
                assert gate.readers == 0

        with ThreadPoolExecutor(1) as pool:
            async with gate.reading(1):
                running = loop.run_in_executor(pool, session)
                await _settle()
            await running
            async with gate.reading(1):  # given back

                def impatient() -> None:
                    with ThreadHold(gate, loop, 0.01) as hold:
                        hold.take()

                with pytest.raises(DeadlineError):
                    await loop.run_in_executor(pool, impatient)
            async with gate.reading(1):
                pass

    asyncio.run(main())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("rw"), st.integers(0, 3), st.booleans()), max_size=12))
def test_never_mixed_never_stuck(plan: list[tuple[str, int, bool]]) -> None:
    """Readers and writers that come, stay for some turns of the loop, and may be cancelled on the way."""

    async def main() -> None:
        gate, reading, writing = Gate(), 0, 0

        async def actor(kind: str, turns: int) -> None:
            nonlocal reading, writing
            if kind == "r":
                async with gate.reading(10):
                    reading += 1
                    try:
                        assert writing == 0
                        for _ in range(turns):
                            await asyncio.sleep(0)
                            assert writing == 0
                    finally:
                        reading -= 1
                return
            await gate.acquire_write(10)
            writing += 1
            try:
                assert (reading, writing) == (0, 1)
                for _ in range(turns):
                    await asyncio.sleep(0)
                    assert (reading, writing) == (0, 1)
            finally:
                writing -= 1
                gate.release_write()

        tasks = []
        for kind, turns, cancel in plan:
            tasks.append(asyncio.create_task(actor(kind, turns)))
            await asyncio.sleep(0)
            if cancel:
                tasks[-1].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(r is None or isinstance(r, asyncio.CancelledError) for r in results), results
        await gate.acquire_write(1)
        gate.release_write()

    asyncio.run(main())
