"""The fault matrix, as far as a CPU shows it (`faults.matrix` prints it as a table); on GPUs, the cells of the data path.

Some 140 cells, four minutes on two busy cores: what is stopped is waited for until a deadline of seconds.
"""

from __future__ import annotations

from typing import Any

import pytest

from faults.actors import STAGES
from faults.cells import KINDS, LOADS, WHO, Cell, cells, senseless
from faults.matrix import SETTINGS, Outcome, markdown, runner


@pytest.mark.timeout(400)
@pytest.mark.parametrize("who", WHO)
def test_cells(who: str) -> None:
    """Nothing hangs, no mixture is served as a version, the next update heals, nothing is left behind."""
    with runner() as it:
        for cell in cells():
            if cell.who == who:
                print(it.run(cell))
    assert not [str(outcome) for outcome in it.outcomes if outcome.problems]


def test_every_cell_is_run_or_says_why_not() -> None:
    every = {(who, stage, kind) for who in WHO for stage in STAGES for kind in KINDS}
    run = {(cell.who, cell.stage, cell.kind) for cell in cells()}
    assert len(every) == 180
    assert {cell for cell in every if not senseless(*cell)} == run
    table = markdown([Outcome(cell, "UpdateError, load", 0.5, "3 dirty", "next update") for cell in cells()])
    assert len(table.splitlines()) == 2 + len(WHO) * len(STAGES)
    assert table.count("UpdateError, load, 0.50 s; 3 dirty; next update") == len(run)
    assert "not run" not in table


@pytest.mark.timeout(240)
@pytest.mark.parametrize("method", ["broadcast", "mapped"])
@pytest.mark.parametrize("who", ["server", "worker"])
def test_other_ways_to_share(method: str, who: str) -> None:
    """Where ranks broadcast over a communicator, or workers map the servers' memory."""
    with runner(method) as it:
        outcomes = [it.run(Cell(who, "load middle", kind)) for kind in ("SIGKILL", "SIGSTOP", "exception")]
    print("", *outcomes, sep="\n")
    assert not [str(outcome) for outcome in outcomes if outcome.problems]


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("who", ["server", "worker", "engine's HTTP"])
@pytest.mark.parametrize("stage", [*LOADS, "release", "commit"])
def test_cells_on_gpus(monkeypatch: pytest.MonkeyPatch, who: str, stage: str) -> None:
    """One GPU a rank, where there are three; else ranks share them, which peer copies and NCCL do not: then skipped."""
    import torch

    if torch.cuda.device_count() < 3:
        pytest.skip("three GPUs are needed, one beside each server")
    device: dict[str, Any] = {"device": "cuda"}
    for name, value in device.items():
        monkeypatch.setitem(SETTINGS, name, value)
    with runner() as it:
        outcomes = [it.run(cell) for cell in cells() if (cell.who, cell.stage) == (who, stage)]
    print("", *outcomes, sep="\n")
    assert not [str(outcome) for outcome in outcomes if outcome.problems]
