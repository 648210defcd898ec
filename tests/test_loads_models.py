"""Real loaders: the embedded engine's over transformers models, and one that loads as vLLM's models do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint_engine.cli.demo.checkpoint import read_checkpoint
from checkpoint_engine.engines.embedded.loader import LoadPass, expected_digests
from checkpoint_engine.engines.embedded.model import ServedModel
from checkpoint_engine.loads.model import Model
from checkpoint_engine.loads.plan import LoadPlan
from checkpoint_engine.loads.proof import Proof
from checkpoint_engine.loads.recorder import Recorder
from embedded_support import save_bert, save_llama
from helpers.loads import Memory, Run, Weights, fingerprint, replay


def in_buckets(checkpoint: dict[str, torch.Tensor], count: int) -> list[Weights]:
    pairs = list(checkpoint.items())
    size = -(-len(pairs) // count)
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def perturbed(checkpoint: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t + torch.randn(t.shape, generator=generator).to(t.dtype) if t.is_floating_point() else t
        for name, t in checkpoint.items()
    }


def recorded(run: Run, buckets: list[Weights], module: torch.nn.Module) -> LoadPlan:
    with Recorder(Model.of(module)) as recorder:
        for bucket in buckets:
            recorder.load(run, Memory(bucket).weights)
        return recorder.finish(Model.of(module), fingerprint(buckets))


@pytest.mark.parametrize("save", [save_bert, save_llama])
def test_record_prove_and_ten_updates_of_an_embedded_engine(save: object, tmp_path: Path) -> None:
    directory = save(tmp_path)  # type: ignore[operator]
    checkpoint = read_checkpoint(directory)
    served = ServedModel.load(directory, "dummy")
    buckets = in_buckets(checkpoint, 3)
    plan = recorded(LoadPass(served.targets).load, buckets, served.module)
    assert plan.useless() is None and served.targets.digests() == expected_digests(served.targets, checkpoint)
    assert len(plan.planned) >= len(checkpoint) - 2, plan.loader  # tied ones are compared, which is no copy

    model = Model.of(served.module)
    proof = Proof(plan, model)
    proof.poison()
    assert proof.differing()
    replay(plan, LoadPass(served.targets).load, buckets, tensors_of(served.module))
    assert proof.differing() == []

    for seed in range(10):
        assert plan.loader == ()
        new = perturbed(checkpoint, seed)
        replay(plan, LoadPass(served.targets).load, in_buckets(new, 3), tensors_of(served.module))
        assert served.targets.digests() == expected_digests(served.targets, new)


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}


def test_a_tied_tensor_that_comes_twice_stays_with_the_loader() -> None:
    """As the embedded engine does it: the second one is compared with what is there."""
    module = torch.nn.Module()
    module.embed, module.head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
    module.head.weight = module.embed.weight
    from checkpoint_engine.engines.embedded.loader import Targets

    values = torch.rand(5, 3)
    buckets = [[("embed.weight", values), ("head.weight", values)]]
    plan = recorded(LoadPass(Targets(module)).load, buckets, module)
    assert plan.planned == () and {left.name for left in plan.loader} == {"embed.weight", "head.weight"}
    assert "every tensor that was loaded" in str(plan.useless())


def test_inspecting_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from checkpoint_engine import cli

    module = torch.nn.Linear(4, 2)
    buckets = [[("weight", torch.rand(2, 4)), ("bias", torch.rand(2, dtype=torch.float64)), ("other", torch.rand(3))]]
    own = dict(module.named_parameters())

    def run(weights: Weights) -> None:
        with torch.no_grad():
            for name, w in weights:
                if name in own:
                    own[name].copy_(w)

    plan = recorded(run, buckets, module)
    file = tmp_path / "load.plan"
    file.write_bytes(plan.encode())
    assert cli.run(["inspect", "--plan", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["replayed"] == {"tensors": 2, "nbytes": 32, "copies": 1}
    assert told["tensors"][0]["copies"][0]["into"] == "weight"
    assert [left["name"] for left in told["loader"]] == ["bias"] and "float64" in told["loader"][0]["reason"]
    assert cli.run(["inspect", "--plan", str(file)]) == 0
    out = capsys.readouterr().out
    assert "2 tensors are replayed" in out and "bias" in out and plan.digest[:12] in out
    file.write_bytes(b"no plan")
    assert cli.run(["inspect", "--plan", str(file)]) == 2
    assert "not a load plan" in capsys.readouterr().err
    assert cli.run(["inspect", "--plan", str(tmp_path / "none")]) == 2
    assert cli.run(["inspect"]) == 2
