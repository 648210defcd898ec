"""Real checkpoints' shapes, clusters by name and by probe, and predictions: against sums by hand and measured rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoint_engine.errors import SettingsError
from checkpoint_engine.manifest import Manifest, RankManifest, RegionMeta, TensorMeta
from checkpoint_engine.planning import zoo
from checkpoint_engine.planning.cluster import DEALINGS, Cluster, dealt, predict_cluster
from checkpoint_engine.planning.presets import KINDS, PUBLISHED, from_probe, preset

MEASURED = json.loads((Path(__file__).parents[1] / "benchmarks" / "measured.json").read_text())
MB = 1_000_000

# Bytes of the files on disk, or twice the parameters of a bfloat16 model; tensors where they are known.
SIZES = {
    "tiny-moe": (10.5e6, 135),
    "qwen3-8b": (16.38e9, 399),
    "qwen3-30b-a3b": (61.06e9, 18867),
    "qwen3-32b": (65.52e9, 707),
    "qwen3-235b-a22b": (470.2e9, None),
    "glm-4.5-air": (220.9e9, None),
    "deepseek-v3.1": (688_586_727_753, None),
    "kimi-k2": (1.03e12, None),
}


def flat(tensors: int, world: int = 1) -> Manifest:
    """Tensors of 1 MB, one in each layer, in turn on each rank."""
    metas: list[list[TensorMeta]] = [[] for _ in range(world)]
    for i in range(tensors):
        metas[i % world].append(TensorMeta(f"layers.{i}.w", "uint8", (MB,), i // world * MB))
    ranks = (RankManifest(r, "", "", (RegionMeta(MB * len(mine), tuple(mine)),)) for r, mine in enumerate(metas))
    return Manifest("flat", tuple(ranks))


def links(**changes: Any) -> Cluster:
    """One host of two GPUs without latencies, and faster than anything unless told."""
    fast: dict[str, Any] = dict.fromkeys(("h2d", "h2d_all", "broadcast", "nic", "copy"), 1e15)
    slack = ("lift_latency", "share_latency", "load_latency", "hop_latency", "nic_latency", "update_seconds")
    fast |= dict.fromkeys(slack, 0.0) | {"name": "links", "hosts": 1, "gpus_per_host": 2}
    return Cluster(**(fast | changes))


@pytest.mark.parametrize("model", zoo.NAMES)
def test_sizes_are_the_published_ones(model: str) -> None:
    manifest = zoo.checkpoint(model)
    nbytes, tensors = SIZES[model]
    assert manifest.nbytes == pytest.approx(nbytes, rel=0.02)
    assert tensors in (None, manifest.tensor_count)
    names = [t.name for t in manifest.ranks[0].regions[0].tensors]
    assert len(set(names)) == len(names)


def test_block_scales() -> None:
    tensors = {t.name: t for t in zoo.checkpoint("deepseek-v3.1").ranks[0].regions[0].tensors}
    assert tensors["model.layers.0.mlp.gate_proj.weight"].shape == (18432, 7168)
    assert tensors["model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 56)
    assert tensors["model.layers.3.mlp.experts.255.down_proj.weight"].dtype == "float8_e4m3fn"
    assert "model.layers.61.eh_proj.weight" in tensors and "model.layers.62.input_layernorm.weight" not in tensors


@pytest.mark.parametrize("dealing", DEALINGS)
def test_dealing_keeps_every_tensor(dealing: str) -> None:
    manifest = dealt(flat(40, 4), 4, dealing)
    names = sorted(t.name for r in manifest.ranks for region in r.regions for t in region.tensors)
    assert names == sorted(f"layers.{i}.w" for i in range(40))
    assert [rank.nbytes for rank in manifest.ranks] == [10 * MB] * 4


def test_each_link_bounds() -> None:
    held = flat(1000, 2)
    lift = predict_cluster(held, links(h2d_all=1e9), tensor_seconds=0.0)
    assert (lift.bound_by, lift.lift) == ("lift", pytest.approx(0.5, rel=0.02))
    assert lift.seconds == pytest.approx(0.5, rel=0.3)  # 1 GB is 16 pieces only
    share = predict_cluster(held, links(broadcast=1e9, beside_load=0.5), tensor_seconds=0.0)
    assert (share.bound_by, share.share) == ("share", pytest.approx(2.0, rel=0.01))
    load = predict_cluster(held, links(update_seconds=5.0), tensor_seconds=1e-3)
    assert (load.bound_by, load.load, load.seconds) == ("load", pytest.approx(1.0), pytest.approx(6.0, rel=0.01))
    assert "for each of 1000 tensors" in load.link


def test_hosts_share_over_their_nics() -> None:
    within = predict_cluster(flat(400), links(broadcast=4e9, nic=1e9), tensor_seconds=0.0)
    assert (within.share, within.link) == (pytest.approx(0.1, rel=0.01), "broadcasts within a host, 4 GB/s")
    between = predict_cluster(flat(400), links(hosts=2, broadcast=4e9, nic=1e9), tensor_seconds=0.0)
    assert (between.share, between.link) == (pytest.approx(0.4, rel=0.01), "broadcasts between hosts, 1 GB/s")
    assert links(hosts=4, gpus_per_host=1, nic=1e9).share == 1e9  # no GPU has another beside it
    assert links(hosts=2, hop_latency=1.0, nic_latency=3.0).rates().hop_latency == 2.0


def test_one_gpu_shares_with_nobody() -> None:
    alone = predict_cluster("tiny-moe", preset("h200", 1, 1))
    assert alone.share == 0 and alone.staging_bytes == 0 and alone.ring_bytes > 0


@pytest.mark.parametrize("row", [r for r in MEASURED["rounds"] if r["low"]], ids=lambda r: str(r["model"]))
def test_predictions_are_within_a_fifth_of_measured_rounds(row: dict[str, Any]) -> None:
    cluster = preset(MEASURED["kind"], MEASURED["hosts"], MEASURED["gpus_per_host"])
    found = predict_cluster(row["model"], cluster, tensor_seconds=MEASURED["tensor_seconds"], dealing=MEASURED["dealing"])
    assert found.seconds == pytest.approx((row["low"] + row["high"]) / 2, rel=0.2)


def test_what_is_published_can_be_predicted() -> None:
    row = PUBLISHED[0]
    found = predict_cluster(row.model, preset(row.kind, row.hosts, row.gpus_per_host))
    assert 0 < found.lift < found.seconds and found.checkpoint == "glm-4.5-air"
    assert {r.kind for r in PUBLISHED} <= set(KINDS) and {r.model for r in PUBLISHED} <= set(zoo.NAMES)


def test_from_a_probe() -> None:
    flow, latency = 300e9, 40e-6
    sizes = (16 << 20, 256 << 20)
    found: dict[str, Any] = {
        "host": "a", "device": "cuda", "memcpy": 1e10, "names": ["x", "y"], "torch": "2", "backend": "nccl",
        "h2d_alone": [5e10, 6e10], "h2d_together": [4e10, 3e10], "device_copy": [1e12, 2e12],
        "broadcast": [{"nbytes": n, "rate": n / (latency + n / flow)} for n in sizes],
    }  # fmt: skip
    cluster = from_probe(json.dumps(found).encode(), 2, 8)
    assert (cluster.h2d, cluster.h2d_all, cluster.copy) == (5e10, 3e10, 1e12)
    assert cluster.broadcast == pytest.approx(flow) and cluster.share_latency == pytest.approx(latency)
    assert cluster.nic == pytest.approx(384e9) and from_probe(json.dumps(found).encode(), 2, 8, 1e9).nic == 1e9
    cpu = from_probe(json.dumps(found | {"device": "cpu", "broadcast": found["broadcast"][:1]}).encode(), 1, 2)
    assert cpu.device == "cpu" and cpu.h2d == 1e10 and cpu.broadcast == found["broadcast"][0]["rate"]
    with pytest.raises(SettingsError, match="nic must be positive"):
        cpu.replace(hosts=2).rates()
    with pytest.raises(SettingsError, match="measured no broadcast"):
        from_probe(json.dumps(found | {"broadcast": []}).encode(), 1, 2)
    with pytest.raises(SettingsError, match="probe --json"):
        from_probe(b"{}", 1, 2)


def test_what_cannot_be_predicted() -> None:
    cluster = preset("h200", 1, 2)
    for arguments, words in (
        ({"checkpoint": "gpt"}, "known are tiny-moe"),
        ({"method": "p2p"}, "no prediction for method 'p2p'"),
        ({"dealing": "by hand"}, "unknown dealing"),
        ({"dealing": "held"}, "held by 1 ranks, not by 2"),
        ({"tensor_seconds": -1.0}, "must not be negative"),
        ({"cluster": cluster.replace(h2d_all=0.0)}, "h2d_all must be positive"),
        ({"cluster": cluster.replace(hosts=0)}, "0 hosts"),
    ):
        with pytest.raises(SettingsError, match=words):
            predict_cluster(**({"checkpoint": "tiny-moe", "cluster": cluster} | arguments))
    with pytest.raises(SettingsError, match="known are h200"):
        preset("b200", 1, 8)
