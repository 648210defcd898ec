"""vLLM started with random weights answers, after an update, exactly what vLLM answers that loaded the checkpoint itself."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import (
    NAMES_VERSIONS,
    answers,
    changed,
    embeddings,
    generate,
    published,
    quantized,
    rpc,
    save_glm4,
    save_qwen3,
    update,
    vllm_beside,
)

from checkpoint_engine.engines import Weights
from checkpoint_engine.engines.vllm import Vllm

pytestmark = pytest.mark.timeout(900)
NO_WORDS = "--skip-tokenizer-init"
MTP = ("--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 1}))


def weights(socket: str) -> Weights | None:
    with Vllm("http://vllm", uds=socket) as engine:
        return engine.weights()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [save_qwen3(tmp_path_factory.mktemp(f"dense-{seed}"), seed) for seed in range(2)]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """With the table of words shared between both ends of the model."""
    return [save_qwen3(tmp_path_factory.mktemp(f"experts-{seed}"), seed, experts=True, tied=True) for seed in range(2)]


def test_answers_after_updates(dense: list[Path], tmp_path: Path) -> None:
    named = ["--enable-scale-out"] if NAMES_VERSIONS else []  # so that answers name versions
    with vllm_beside(dense, NO_WORDS, *named) as (socket, expected):
        assert expected[0] != expected[1]
        assert weights(socket) == Weights(None, False)
        assert answers(socket) not in expected
        for number, which in enumerate((0, 1, 1, 0)):
            assert update(socket, dense[which], f"v{number}", map_regions=number % 2 == 1) == [None]
            assert weights(socket) == Weights(f"v{number}", False)
            assert answers(socket) == expected[which], number
        _requests_go_on(socket, dense, expected)
        if NAMES_VERSIONS:
            _requests_are_kept(socket, dense)
        _quantized_is_refused(socket, quantized(dense[1], tmp_path / "int8"))
        assert update(socket, dense[1], "healed") == [None]
        assert answers(socket) == expected[1]


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


def _requests_are_kept(socket: str, checkpoints: list[Path]) -> None:
    """Requests that run when an update comes under `pause keep` finish with all their tokens: those before it are the old
    version's, and those after it the new one's, and vLLM says so."""
    for _ in range(4):  # on a busy machine requests may be over, or not have begun, when the pause takes hold
        if both := _kept(socket, checkpoints, 600):
            break
    assert both
    for answer, old in both:
        first, second = answer["weight_versions"]
        assert (first["version"], second["version"], second["end"]) == ("old", "new", 600)
        assert 0 < first["end"] == second["start"] < 600
        assert answer["token_ids"][: first["end"]] == old[: first["end"]]
        assert answer["token_ids"] != old
    assert published(socket) == "new"


def _kept(socket: str, checkpoints: list[Path], length: int) -> list[tuple[dict[str, Any], list[int]]]:
    """Those of two requests that an update came into, each with what the old version alone would have answered."""
    prompts = [[5, 6, 7, 8], [9, 300, 17]]
    assert update(socket, checkpoints[0], "old") == [None]
    before = [generate(socket, prompt, length)["token_ids"] for prompt in prompts]
    with ThreadPoolExecutor(2) as pool, Vllm("http://vllm", uds=socket) as engine:
        begun = threading.Event()
        asked = [pool.submit(generate, socket, prompt, length, begun) for prompt in prompts]
        assert begun.wait(60)
        engine.pause("keep", 60)
        assert update(socket, checkpoints[1], "new") == [None]
        engine.resume(60)
        kept = [one.result(60) for one in asked]
    assert all(len(answer["token_ids"]) == length for answer in kept)
    return [each for each in zip(kept, before, strict=True) if len(each[0]["weight_versions"]) == 2]


def _quantized_is_refused(socket: str, checkpoint: Path) -> None:
    """Where the engine's layers are not quantized, numbers without their scale would be taken for weights."""
    (error,) = update(socket, checkpoint, "quantized")
    assert error is not None
    assert "proj.weight" in error
    assert "int8" in error or "scale" in error, error
    state = weights(socket)
    assert state is not None
    assert state.dirty


def test_two_workers_fail_update_update(experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an update fails of, the model is whole again, both workers answer in turn, and the next update heals it.

    By vLLM's loader in every update: test_vllm_recorded does the same to load plans.
    """
    monkeypatch.setenv("CHECKPOINT_ENGINE_RECORDED_LOADS", "off")
    with vllm_beside(experts, NO_WORDS, tensor_parallel=2) as (socket, expected):
        assert expected[0] != expected[1]
        layout = rpc(socket, "testing_layout")
        for number, (bad, reason) in enumerate(_bad(experts[1], tmp_path)):
            errors = update(socket, bad, f"bad{number}", 2)
            assert all(error is not None and reason in error for error in errors), errors
            if number == 0:  # nothing whole was loaded before it, and the next ones come after a whole update
                _good(socket, experts[0])
                assert answers(socket) == expected[0]
            _whole(socket, layout, dirty=number > 0)
        _heals(socket, layout, expected, experts, "h")
        for rank, call in ((0, 1), (1, 3)):
            rpc(socket, "testing_fail", rank, call)
            errors = update(socket, experts[1], "broken", 2)
            assert all(error is not None and f"rank {rank}" in error and "out of order" in error for error in errors), errors
            rpc(socket, "testing_fail", rank, -1)
            _whole(socket, layout, dirty=True)
            _heals(socket, layout, expected, experts, f"f{rank}")


def _good(socket: str, checkpoint: Path) -> None:
    assert update(socket, checkpoint, "good", 2) == [None, None]
    for status in rpc(socket, "weights_status"):
        ways = status["layers"]
        assert (ways["stage"], ways["refresh"]) == (3 * 4, 2), status  # projections, gate and experts; both ends' table
        assert 0 < status["staged_peak_bytes"] < (checkpoint / "model.safetensors").stat().st_size / 4, status


def _bad(checkpoint: Path, folder: Path) -> list[tuple[Path, str]]:
    projection, expert = "model.layers.2.self_attn.o_proj.weight", "model.layers.1.mlp.experts.3.down_proj.weight"
    key = "model.layers.0.self_attn.k_proj.weight"
    return [
        (changed(checkpoint, folder / "first", lambda t: t.pop(key)), "model.layers.0.self_attn.qkv_proj.weight (part k)"),
        (changed(checkpoint, folder / "shape", lambda t: t.update({projection: t[projection][:, :-2].contiguous()})), projection),
        (changed(checkpoint, folder / "name", lambda t: t.update({"model.layers.1.nose.weight": t[expert].clone()})), "nose"),
        (changed(checkpoint, folder / "norm", lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
        (changed(checkpoint, folder / "missing", lambda t: t.pop(projection)), projection),
        (changed(checkpoint, folder / "expert", lambda t: t.pop(expert)), expert),
        (changed(checkpoint, folder / "part", lambda t: t.pop(key)), key),
    ]


def _whole(socket: str, layout: list[Any], *, dirty: bool) -> None:
    state = weights(socket)
    assert state is not None
    assert state.dirty == dirty
    now = rpc(socket, "testing_layout")
    assert [list(each) for each in now] == [list(each) for each in layout]
    assert now == layout


def _heals(socket: str, layout: list[Any], expected: list[Any], checkpoints: list[Path], version: str) -> None:
    for which in (1, 0):
        assert update(socket, checkpoints[which], f"{version}{which}", 2) == [None, None]
        assert weights(socket) == Weights(f"{version}{which}", False)
        assert answers(socket) == expected[which]
    _whole(socket, layout, dirty=False)


def _digests(socket: str) -> list[dict[str, str]]:
    return list(rpc(socket, "testing_digest", False))


def test_expert_parallel(experts: list[Path]) -> None:
    """Each rank has the experts that are its own. vLLM 0.32 on a CPU loads them so, but dies of the first request; hence what is
    in its parameters is compared, experts packed for the CPU among them, and not what it answers."""
    ours = (NO_WORDS, "--enable-expert-parallel")
    with vllm_beside(experts[1:], *ours, tensor_parallel=2, ask=_digests) as (socket, (expected,)):
        names = [name for name in expected[0] if name.endswith(("w13_weight", "w2_weight"))]
        assert len(names) == 2 * 3
        assert all(expected[0][name] != expected[1][name] for name in names)
        for number, which in enumerate((1, 0, 1)):
            assert update(socket, experts[which], f"v{number}", 2) == [None, None]
            now = _digests(socket)
            assert (now == expected) == (which == 1), number
            assert all((one[name] == two[name]) == (which == 1) for one, two in zip(now, expected, strict=True) for name in names)


def test_quantized(dense: list[Path], tmp_path: Path) -> None:
    """int8 with a scale a channel, the one quantization that this machine's vLLM computes with: it packs weights away."""
    checkpoints = [quantized(checkpoint, tmp_path / f"int8-{n}") for n, checkpoint in enumerate(dense)]
    scale = "model.layers.1.self_attn.k_proj.weight_scale"
    bare = changed(checkpoints[1], tmp_path / "bare", lambda t: [t.pop(n) for n in list(t) if n.endswith("scale")])
    less = changed(checkpoints[1], tmp_path / "less", lambda t: t.pop(scale))
    with vllm_beside(checkpoints[1:], NO_WORDS) as (socket, (expected,)):
        (error,) = update(socket, bare, "bare")
        assert error is not None
        assert "weight_scale" in error
        for number, which in enumerate((1, 0, 1)):
            assert update(socket, checkpoints[which], f"v{number}") == [None]
            assert (answers(socket) == expected) == (which == 1), number
        (error,) = update(socket, less, "less")
        assert error is not None
        assert scale in error
        assert update(socket, checkpoints[1], "healed") == [None]
        assert answers(socket) == expected


@pytest.fixture(scope="module")
def speculating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_glm4(tmp_path_factory.mktemp("glm4"), 0)


def _state(socket: str) -> tuple[Any, Any, Any]:
    return answers(socket), rpc(socket, "testing_digest", False), rpc(socket, "testing_digest", True)


def test_draft(speculating: Path, tmp_path: Path) -> None:
    """The layer that predicts a further token is updated with its model, or left alone whole, or brought by itself."""
    draft = "model.layers.3."

    def without(name: str, part: str) -> Path:
        return changed(speculating, tmp_path / name, lambda t: [t.pop(n) for n in list(t) if n.startswith(draft) and part in n])

    other = save_glm4(tmp_path / "other", 1)
    only = changed(
        other,
        tmp_path / "only",
        lambda t: [t.update({f"draft.{n}": w} if n.startswith(draft) else {}) for n, w in [(n, t.pop(n)) for n in list(t)]],
    )
    with vllm_beside([speculating], NO_WORDS, *MTP, ask=_state) as (socket, (expected,)):
        states = []
        for number, checkpoint in enumerate((speculating, other, speculating)):
            assert update(socket, checkpoint, f"v{number}") == [None]
            states.append(_state(socket))
        assert states[0] == states[2] == expected
        assert all(one != two for one, two in zip(states[1], expected, strict=True))
        (status,) = rpc(socket, "weights_status")
        assert status["draft_layers"], status
        (error,) = update(socket, without("part", "experts.2.up_proj"), "part")
        assert error is not None
        assert f"{draft}mlp.experts.2.up_proj.weight" in error
        assert update(socket, without("none", ""), "none") == [None]
        (status,) = rpc(socket, "weights_status")
        assert status["draft_layers"] == {}
        assert answers(socket) == expected[0]
        assert update(socket, only, "only") == [None]
        now = _state(socket)
        assert now[:2] == expected[:2]
        assert now[2] == _shared(states[1][2], expected[2])


def _shared(own: Any, target: Any) -> Any:
    """A draft's digests with those of the tables that it shares with its target."""
    return [
        {n: theirs[n] if "embed" in n or "head.head" in n or "lm_head" in n else d for n, d in mine.items()}
        for mine, theirs in zip(own, target, strict=True)
    ]


def test_pooling_model_of_real_weights() -> None:
    from checkpoint_engine.cli.demo.checkpoint import default_checkpoint

    model = default_checkpoint()
    with vllm_beside([model], "--runner", "pooling", "--max-model-len", "256", ask=embeddings) as (socket, (expected,)):
        assert embeddings(socket) != expected
        for number in range(2):
            assert update(socket, model, f"v{number}") == [None]
            assert embeddings(socket) == expected
