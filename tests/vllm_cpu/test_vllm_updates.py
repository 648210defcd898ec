"""vLLM started with random weights answers, after an update, exactly what vLLM answers that loaded the checkpoint itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import answers, changed, embeddings, rpc, save_qwen3, update, vllm_server

from checkpoint_engine.engines import Weights
from checkpoint_engine.engines.vllm import Vllm

pytestmark = pytest.mark.timeout(600)
NO_WORDS = "--skip-tokenizer-init"
WITH_TESTS = ("--worker-extension-cls", "extension.Extension")


def weights(socket: str) -> Weights | None:
    with Vllm("http://vllm", uds=socket) as engine:
        return engine.weights()


def loaded_by_itself(checkpoints: list[Path], tensor_parallel: int) -> list[list[list[int]]]:
    expected = []
    for checkpoint in checkpoints:
        with vllm_server(checkpoint, NO_WORDS, load=True, tensor_parallel=tensor_parallel) as socket:
            expected.append(answers(socket))
    assert expected[0] != expected[1]
    return expected


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [save_qwen3(tmp_path_factory.mktemp(f"dense-{seed}"), seed) for seed in range(2)]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """With the table of words shared between both ends of the model."""
    return [save_qwen3(tmp_path_factory.mktemp(f"experts-{seed}"), seed, experts=True, tied=True) for seed in range(2)]


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_answers_after_updates(kind: str, request: pytest.FixtureRequest) -> None:
    checkpoints: list[Path] = request.getfixturevalue(kind)
    expected = loaded_by_itself(checkpoints, 1)
    with vllm_server(checkpoints[0], NO_WORDS) as socket:
        assert weights(socket) == Weights(None, False)
        assert answers(socket) not in expected
        for number, which in enumerate((0, 1, 1, 0)):
            assert update(socket, checkpoints[which], f"v{number}", map_regions=number % 2 == 1) == [None]
            assert weights(socket) == Weights(f"v{number}", False)
            assert answers(socket) == expected[which], number
        _requests_go_on(socket, checkpoints, expected)


def _requests_go_on(socket: str, checkpoints: list[Path], expected: list[Any]) -> None:
    """With generation paused during updates, each answer is one checkpoint's, whole; none fails."""
    seen: list[Any] = []
    failures: list[BaseException] = []
    begun, ended = threading.Event(), threading.Event()

    def ask() -> None:
        try:
            while not ended.is_set():
                seen.append(answers(socket)[0])
                begun.set()
        except BaseException as e:
            failures.append(e)
            begun.set()

    client = threading.Thread(target=ask)
    client.start()
    try:
        assert begun.wait(60)
        with Vllm("http://vllm", uds=socket) as engine:
            for which in (1, 0):
                engine.pause("wait", 60)
                assert engine.paused()
                assert update(socket, checkpoints[which], f"w{which}") == [None]
                engine.resume(60)
                assert not engine.paused()
                assert answers(socket) == expected[which]
    finally:
        ended.set()
        client.join(60)
    assert failures == []
    assert {tuple(one) for one in seen} <= {tuple(each[0]) for each in expected}


@pytest.fixture
def pair(experts: list[Path]) -> Iterator[tuple[str, list[list[list[int]]]]]:
    """A server of two workers with random weights, and what each checkpoint answers on two."""
    expected = loaded_by_itself(experts, 2)
    with vllm_server(experts[0], NO_WORDS, *WITH_TESTS, tensor_parallel=2) as socket:
        yield socket, expected


def test_two_workers_fail_update_update(pair: tuple[str, list[Any]], experts: list[Path], tmp_path: Path) -> None:
    """Whatever an update fails of, the model is whole again, both workers answer in turn, and the next update heals it."""
    socket, expected = pair
    layout = rpc(socket, "testing_layout")
    assert update(socket, experts[0], "good", 2) == [None, None]
    for status in rpc(socket, "weights_status"):
        ways = status["layers"]
        assert (ways["stage"], ways["refresh"]) == (3 * 4, 2), status  # projections, gate and experts; both ends' table
        assert 0 < status["staged_peak_bytes"] < (experts[0] / "model.safetensors").stat().st_size / 4, status
    assert answers(socket) == expected[0]
    for number, (bad, reason) in enumerate(_bad(experts[1], tmp_path)):
        errors = update(socket, bad, f"bad{number}", 2)
        assert all(error is not None and reason in error for error in errors), errors
        _heals(socket, layout, expected, experts, f"h{number}")
    for rank, call in ((0, 1), (1, 3)):
        rpc(socket, "testing_fail", rank, call)
        errors = update(socket, experts[1], "broken", 2)
        assert all(error is not None and f"rank {rank}" in error and "out of order" in error for error in errors), errors
        rpc(socket, "testing_fail", rank, -1)
        _heals(socket, layout, expected, experts, f"f{rank}")


def _bad(checkpoint: Path, folder: Path) -> list[tuple[Path, str]]:
    projection, expert = "model.layers.2.self_attn.o_proj.weight", "model.layers.1.mlp.experts.3.down_proj.weight"
    return [
        (changed(checkpoint, folder / "shape", lambda t: t.update({projection: t[projection][:, :-2].contiguous()})), projection),
        (changed(checkpoint, folder / "name", lambda t: t.update({"model.layers.1.nose.weight": t[expert].clone()})), "nose"),
        (changed(checkpoint, folder / "norm", lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
        (changed(checkpoint, folder / "missing", lambda t: t.pop(projection)), projection),
    ]


def _heals(socket: str, layout: list[Any], expected: list[Any], checkpoints: list[Path], version: str) -> None:
    state = weights(socket)
    assert state is not None
    assert state.dirty
    now = rpc(socket, "testing_layout")
    assert [list(each) for each in now] == [list(each) for each in layout]
    assert now == layout
    for which in (1, 0):
        assert update(socket, checkpoints[which], f"{version}{which}", 2) == [None, None]
        assert weights(socket) == Weights(f"{version}{which}", False)
        assert answers(socket) == expected[which]


def test_pooling_model_of_real_weights() -> None:
    from checkpoint_engine.cli.demo.checkpoint import default_checkpoint

    model = default_checkpoint()
    with vllm_server(model, "--runner", "pooling", load=True) as socket:
        expected = embeddings(socket)
    with vllm_server(model, "--runner", "pooling") as socket:
        assert embeddings(socket) != expected
        for number in range(2):
            assert update(socket, model, f"v{number}") == [None]
            assert embeddings(socket) == expected
