"""Recorded loads in the embedded engine: real models, real servers, and after every update what a fresh load would have made."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from checkpoint_engine.cli.demo.checkpoint import default_checkpoint, read_checkpoint
from checkpoint_engine.cli.demo.processes import free_port_pair
from checkpoint_engine.cli.engine import worker
from checkpoint_engine.engines import Engine, get_engine, request_for_rank
from checkpoint_engine.engines.embedded.loader import expected_digests
from checkpoint_engine.engines.embedded.model import ServedModel
from checkpoint_engine.engines.embedded.service import EmbeddedEngine
from checkpoint_engine.errors import UpdateError
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.server.report import UpdateReport
from checkpoint_engine.settings import Settings
from embedded_support import save_bert, save_llama, serving

WAIT = 60
MODELS = {"bert": save_bert, "llama": save_llama}
SMALL = 4096
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=MODELS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = MODELS[request.param]
    directory: Path = save(tmp_path_factory.mktemp(request.param))
    return directory


@pytest.fixture
def engine(directory: Path) -> Iterator[tuple[ServedModel, Engine]]:
    model = ServedModel.load(directory, "dummy")
    with serving(EmbeddedEngine(model, worker(None))) as url, get_engine("sglang", url) as client:
        yield model, client


def _server(socket_dir: Path, **changes: object) -> ParameterServer:
    settings = Settings(device="cpu", socket_dir=socket_dir).replace(**{"bucket_bytes": SMALL, **changes})
    return ParameterServer(rank=0, world_size=1, master_addr="127.0.0.1", master_port=free_port_pair(), settings=settings)


def _update(ps: ParameterServer, engine: Engine, version: str, tensors: Tensors) -> UpdateReport:
    ps.register_checkpoint(version, named_tensors=tensors)
    try:
        ps.gather_metas(version)
        request = request_for_rank([engine], 0, 1, version, WAIT)
        return ps.update(version, request, timeout=timedelta(seconds=WAIT), version=version)
    finally:
        ps.unregister_checkpoint(version)


def _changed(tensors: Tensors, seed: int) -> Tensors:
    """Positions, which are integers, stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    floating = {n: t for n, t in tensors.items() if t.is_floating_point()}
    return tensors | {n: t + torch.randn(t.shape, generator=generator).to(t.dtype) / 8 for n, t in floating.items()}


def _answer(model: ServedModel) -> object:
    return model.embed(["the cat sat", "a red dog ran"]) if model.kind == "embed" else model.generate([[3, 4, 5]])[0].output_ids


def _ten_updates(directory: Path, model: ServedModel, client: Engine, ps: ParameterServer, method: str) -> None:
    first = read_checkpoint(directory)
    for number in range(10):
        tensors = _changed(first, number)
        report = _update(ps, client, f"v{number}", tensors)
        assert report.notes == ()
        assert report.passes == (2 if number == 0 else 1)
        assert report.ways == (("proved",) if number == 0 else ("replayed",))
        mapped = "mapped" if number == 0 else "pull"
        assert report.method == (mapped if method == "pull" else "broadcast")
        assert {"record", "prove"} <= set(report.stages) if number == 0 else "replay" in report.stages
        assert report.stages["worker"].seconds > 0
        assert model.targets.digests() == expected_digests(model.targets, tensors)
        assert _answer(model) == _answer(ServedModel.load(directory, state_dict=tensors))


@pytest.mark.parametrize("method", ["pull", "broadcast"])
def test_ten_updates_are_ten_fresh_loads(
    directory: Path, engine: tuple[ServedModel, Engine], tmp_path: Path, method: str
) -> None:
    with _server(tmp_path, method=method) as ps:
        _ten_updates(directory, *engine, ps, method)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", ["pull", "broadcast"])
def test_ten_updates_of_a_published_model(tmp_path: Path, method: str) -> None:
    """all-MiniLM-L6-v2, 91 MB."""
    directory = default_checkpoint()
    model = ServedModel.load(directory, "dummy")
    engine = EmbeddedEngine(model, worker(None))
    with (
        serving(engine) as url,
        get_engine("sglang", url) as client,
        _server(tmp_path, method=method, bucket_bytes=4 << 20) as ps,
    ):
        _ten_updates(directory, model, client, ps, method)


def test_one_tensor_more_fewer_or_of_another_shape(directory: Path, engine: tuple[ServedModel, Engine], tmp_path: Path) -> None:
    """Other checkpoints are never loaded by the plan of this one; and it still serves when this one comes again."""
    model, client = engine
    first = read_checkpoint(directory)
    with _server(tmp_path) as ps:
        _update(ps, client, "first", first)
        assert _update(ps, client, "again", first).ways == ("replayed",)

        last = sorted(first)[-1]
        with pytest.raises(UpdateError, match=last):
            _update(ps, client, "shape", {**first, last: torch.zeros(7)})
        with pytest.raises(UpdateError, match=r"zz\.more"):
            _update(ps, client, "more", {**first, "zz.more": torch.zeros(3)})
        with pytest.raises(UpdateError, match="lacks"):
            _update(ps, client, "fewer", {n: t for n, t in first.items() if n != last})

        healed = _changed(first, 1)
        assert _update(ps, client, "healed", healed).ways == ("replayed",)
        assert model.targets.digests() == expected_digests(model.targets, healed)


def test_parameters_that_moved_are_recorded_again(directory: Path, engine: tuple[ServedModel, Engine], tmp_path: Path) -> None:
    model, client = engine
    first = read_checkpoint(directory)
    with _server(tmp_path) as ps:
        _update(ps, client, "first", first)
        parameter = next(iter(model.module.parameters()))
        parameter.data = parameter.data.clone()
        tensors = _changed(first, 1)
        assert _update(ps, client, "moved", tensors).ways == ("proved",)
        assert model.targets.digests() == expected_digests(model.targets, tensors)
        assert _update(ps, client, "again", tensors).ways == ("replayed",)


def test_switched_off(
    directory: Path, engine: tuple[ServedModel, Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHECKPOINT_ENGINE_RECORDED_LOADS", "off")
    model, client = engine
    first = read_checkpoint(directory)
    with _server(tmp_path) as ps:
        for number in range(2):
            report = _update(ps, client, f"v{number}", first)
            assert (report.ways, report.passes, report.method) == (("loader",), 1, "mapped")
    assert model.targets.digests() == expected_digests(model.targets, first)
