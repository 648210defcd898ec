"""Liveness while an update runs: the loop that answers is held up by none of it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from transformers import BertConfig, BertModel

from helpers.engines import engine_processes
from helpers.rest import Served, engine_bodies, follow, serving, wait_until_met

RANKS = 2
MOST = 2.0
"""Seconds; it is meant to be 0.05, and printed, but a test's host has other things to do."""


def probe(served: Served, stop: threading.Event, took: list[float]) -> None:
    with served.client() as client:
        while not stop.is_set():
            begun = time.perf_counter()
            client.get("/v1/healthz").raise_for_status()
            took.append(time.perf_counter() - begun)
            stop.wait(0.005)


def updates(rest: httpx.Client, urls: list[str], count: int) -> float:
    """Seconds of them all."""
    seconds = 0.0
    for number in range(count):
        body = {"checkpoint": "large", "engines": engine_bodies(urls), "version": f"v{number}"}
        record = follow(rest, rest.post("/v1/updates", json=body).raise_for_status().json()["id"])
        assert record["state"] == "committed", record
        seconds += record["seconds"]
    return seconds


@pytest.mark.timeout(120)
def test_healthz_answers_while_bytes_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30_000, hidden_size=384, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1536)
    BertModel(config).save_pretrained(tmp_path)
    with engine_processes(tmp_path, [[]] * RANKS) as urls, serving(RANKS) as served, served.client() as rest:
        wait_until_met(rest, RANKS)
        made = rest.post("/v1/checkpoints", json={"name": "large", "directory": str(tmp_path)}).raise_for_status().json()
        took: list[float] = []
        stop = threading.Event()
        thread = threading.Thread(target=probe, args=(served, stop, took))
        thread.start()
        try:
            seconds = updates(rest, urls, 3)
        finally:
            stop.set()
            thread.join()
    worst, median = max(took), sorted(took)[len(took) // 2]
    with capsys.disabled():
        print(
            f"\nhealthz, {len(took)} times while {made['nbytes'] / 1e6:.0f} MB moved three times in {seconds:.1f} s: "
            f"{median * 1e3:.1f} ms in the middle, {worst * 1e3:.1f} ms at worst"
        )
    assert len(took) >= 10 and worst < MOST
