"""The dashboard in headless Chromium, against a fleet of eight ranks that updates eight engines.

Needs Debian's chromium and, from `make tools`, playwright. Screenshots stay in pytest's temporary directory.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.engines import engine_processes
from helpers.rest import engine_bodies, follow, gated, model_dir, serving, wait_until_met
from helpers.tools import tool

RANKS = 8
SCRIPT = Path(__file__).with_name("browser_dashboard.py")

pytestmark = pytest.mark.timeout(240)  # on two cores, seventeen processes take their time to start


@pytest.fixture(scope="module")
def browser() -> tuple[str, str]:
    """(Python with playwright, chromium); skipped where there is none."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here (Debian's package of that name)")
    return tool("python"), chromium


@contextmanager
def opened(browser: tuple[str, str], url: str, directory: Path) -> Iterator[Callable[[str], Any]]:
    """`see(step)`: have the browser do one step of the script, and tell what it saw."""
    python, chromium = browser
    command = [python, str(SCRIPT), url, chromium, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def see(step: str) -> Any:
            stdin.write(f"{step}\n")
            stdin.flush()
            seen = json.loads(stdout.readline() or '{"complaints": ["the browser is gone"]}')
            assert seen.pop("complaints") == []
            assert seen.pop("elsewhere") == []
            return seen

        try:
            yield see
        finally:
            stdin.close()
            try:
                process.wait(20)
            finally:
                process.kill()


def test_dashboard_follows_a_fleet(browser: tuple[str, str], tmp_path: Path) -> None:
    model = model_dir(tmp_path / "bert")
    screenshots = tmp_path / "screenshots"
    screenshots.mkdir()
    ceilings = tmp_path / "ceilings.json"
    ceilings.write_text(
        json.dumps({"host": "h", "device": "cpu", "names": ["cpu"], "torch": "2", "backend": "gloo", "memcpy": 8e9})
    )
    with (
        engine_processes(model, [[]] * RANKS) as urls,
        serving(RANKS, "--port", "0", "--ceilings", str(ceilings), env={"CHECKPOINT_ENGINE_BUCKET_BYTES": "4096"}) as served,
        served.client() as rest,
        opened(browser, served.url, screenshots) as see,
    ):
        wait_until_met(rest, RANKS)
        rest.post("/v1/checkpoints", json={"name": "step", "directory": str(model)}).raise_for_status()
        seen = see("idle")
        assert seen["fleet"].startswith("8 ranks")
        assert [row[0] for row in seen["ranks"]] == [str(rank) for rank in range(RANKS)]
        _follow_one(rest, urls, see)
        _fail_and_cancel(rest, urls, see)
        reached = see("keyboard")
        assert reached["reached"][0] == "Skip to the content"
        assert reached["reached"][1:] == ["v3", "v2", "v1"]
        assert (reached["chosen"], reached["kept"], reached["title"]) == ("v1", "v1", "Update to v1")
        assert reached["outline"] == "solid"
        assert see("phone") == {"width": 390, "small": []}
        assert see("dark") == {"back": "rgb(20, 23, 27)"}
    assert len(list(screenshots.iterdir())) == 11


def _begin(rest: httpx.Client, urls: list[str], version: str) -> str:
    answer = rest.post("/v1/updates", json={"checkpoint": "step", "engines": engine_bodies(urls), "version": version})
    id_: str = answer.raise_for_status().json()["id"]
    return id_


def _follow_one(rest: httpx.Client, urls: list[str], see: Callable[[str], Any]) -> None:
    """While its last engine is held, and then to its end."""
    with gated(urls[-1]) as (front, asked, may):
        id_ = _begin(rest, [*urls[:-1], front], "v1")
        assert asked.wait(20)
        seen = see("running")
        assert "updating v1" in seen["state"] and id_ in seen["state"]
        assert seen["bars"] == RANKS
        may.set()
        assert follow(rest, id_)["state"] == "committed"
        see("idle")
        seen = see("over")
    assert seen["title"] == "Update to v1"
    assert seen["updates"][0][0] == "v1" and "committed" in seen["updates"][0][2]
    stages = {row[0]: row for row in seen["stages"]}
    assert stages["load"][4] == "8.00 GB/s" and stages["load"][5].endswith(" %")  # beside the host's ceiling
    assert stages["share"][4] == "8.00 GB/s"
    assert [row[0] for row in seen["works"]] == [f"rank {rank}" for rank in range(RANKS)]
    assert all("share" in row for row in seen["works"])
    timeline = rest.get(f"/v1/updates/{id_}/timeline").raise_for_status().json()
    assert seen["timeline"] == [f"rank {rank} on {timeline['ranks'][rank]['host']}" for rank in range(RANKS)]
    assert seen["bound"] == timeline["bound"]
    assert set(seen["lanes"]) >= {"lift", "share", "load", "around"}
    _read_timeline(see, timeline)
    assert seen["columns"] == 1
    assert [row[2] for row in seen["engines"]] == ["v1"] * RANKS


def _read_timeline(see: Callable[[str], Any], timeline: Any) -> None:
    seen = see("spans")
    spans = timeline["ranks"][0]["spans"]
    for text, span in zip(seen["read"], (spans[0], spans[1], spans[-1]), strict=True):
        assert text.startswith(f"rank 0: {span['stage']}")
    assert seen["pointed"].startswith(f"rank {RANKS - 1}: ")
    assert seen["painted"] == [True] * RANKS
    assert seen["events"] >= sum(len(rank["spans"]) for rank in timeline["ranks"])


def _fail_and_cancel(rest: httpx.Client, urls: list[str], see: Callable[[str], Any]) -> None:
    follow(rest, _begin(rest, [*urls[:-1], "http://127.0.0.1:1"], "v2"))
    see("idle")
    with gated(urls[-1]) as (front, asked, may):
        id_ = _begin(rest, [*urls[:-1], front], "v3")
        assert asked.wait(20)
        see("running")
        seen = see("cancel")
        may.set()
        assert follow(rest, id_)["state"] == "cancelled"
    assert [row[0] for row in seen["updates"]] == ["v3", "v2", "v1"]
    assert ["cancelled" in seen["updates"][0][2], "failed" in seen["updates"][1][2]] == [True, True]
    assert "stage cancel" in seen["problem"][0]
