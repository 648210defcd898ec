"""One replica of four workers on two hosts: rank 0 asks its leader, whose followers are on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.engines import engine_processes
from helpers.fleet import server
from helpers.netns import TwoHosts
from helpers.ports import free_ports
from helpers.ranks import run_ranks

WORLD = 4
SECONDS = 30.0


def _update(rank: int, world_size: int, urls: list[str], file: str) -> Any:
    """What this rank's own engine holds before and after, what it says it serves, and the bytes that each rank lifted."""
    from checkpoint_engine.engines import get_engine, request_for_rank
    from checkpoint_engine.engines.sglang import SGLang

    own = SGLang(urls[rank])
    with own, get_engine("sglang", urls[0]) as leader, server(bucket_bytes=4096) as ps:
        leader.wait_ready(SECONDS)
        before = own.request("GET", "/v1/parameters/digest", None, SECONDS).json()
        ps.store_based_barrier()
        ps.register_checkpoint("c", files=[file], stripe=True)
        ps.gather_metas("c")
        asked: list[int] = []
        request = request_for_rank([leader], rank, world_size, version="new", seconds=SECONDS)

        def ask(handles: list[tuple[str, str]]) -> None:
            asked.append(len({uuid for uuid, _ in handles}))
            request(handles)

        report = ps.update("c", ask, version="new")
        after = own.request("GET", "/v1/parameters/digest", None, SECONDS).json()
        ps.store_based_barrier()  # nobody leaves while another still looks
        return before, after, own.weights(), asked, [stages["lift"].nbytes for stages in report.ranks]


@pytest.mark.timeout(90)
def test_a_replica_that_spans_two_hosts(netns: TwoHosts, tmp_path: Path) -> None:
    from checkpoint_engine.cli.demo.checkpoint import read_checkpoint
    from checkpoint_engine.engines import Weights
    from checkpoint_engine.engines.embedded.loader import expected_digests
    from checkpoint_engine.engines.embedded.model import ServedModel
    from embedded_support import save_bert

    model = save_bert(tmp_path / "bert")
    hosts = [netns.hosts[rank * len(netns.hosts) // WORLD] for rank in range(WORLD)]
    ports = free_ports(WORLD)
    urls = [f"http://{host.address}:{ports + rank}" for rank, host in enumerate(hosts)]
    arguments = [["--host", host.address, "--port", str(ports + rank)] for rank, host in enumerate(hosts)]
    arguments[0] += [word for url in urls[1:] for word in ("--follower", url)]
    with engine_processes(model, arguments, hosts) as listening:
        assert listening == urls
        results = run_ranks(_update, WORLD, urls, str(model / "model.safetensors"), hosts=netns.hosts)
    expected = expected_digests(ServedModel.load(model, "dummy").targets, read_checkpoint(model))
    lifted = results[0][4]
    assert all(nbytes > 0 for nbytes in lifted)  # so bytes crossed between the hosts in both directions
    for rank, (before, after, weights, asked, lifts) in enumerate(results):
        assert before != expected, f"rank {rank}"
        assert after == expected, f"rank {rank}"
        assert weights == Weights("new", False)
        assert asked == [WORLD]  # four different workers
        assert lifts == lifted
