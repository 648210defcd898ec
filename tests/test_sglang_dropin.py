"""SGLang's own update script and worker class, from its wheels and unchanged, run against this package.

What they talk to is real: an HTTP server, processes that hold a sharded model, sockets and memory shared with the ranks.
"""

from __future__ import annotations

import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_engine.manifest import Manifest
from helpers.ports import free_ports
from helpers.ranks import RanksFailed, run_ranks
from helpers.sglang_engine import checkpoint, expected, sglang_engine
from helpers.sglang_wheel import FOLDER, Unavailable, sglang_wheel

pytestmark = pytest.mark.timeout(300)
SECONDS = 90.0
SMALL = {"CHECKPOINT_ENGINE_BUCKET_BYTES": str(32 << 10), "CHECKPOINT_ENGINE_TIMEOUT": "30"}
BROADCAST = {**SMALL, "CHECKPOINT_ENGINE_MAP_REGIONS": "0"}  # what runs on GPUs, and between hosts
PING = {"0.5.17": 200, "0.5.23": 503}
"""What SGLang's GET /ping answers while it waits for its first weights."""


@pytest.fixture(scope="module", params=sorted(PING))
def version(request: pytest.FixtureRequest) -> str:
    text: str = request.param
    return text


@pytest.fixture(scope="module")
def wheel(version: str) -> Path:
    try:
        return sglang_wheel(version)
    except Unavailable as e:
        pytest.skip(f"no wheel of sglang {version}: {e}")


def save(path: Path, tensors: dict[str, torch.Tensor], files: int, *, index: bool = True) -> Path:
    """A folder with the checkpoint in `files` safetensors files; with an index the script sends tensors, else files."""
    path.mkdir()
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        mine = {key: tensor for i, (key, tensor) in enumerate(tensors.items()) if i % files == number}
        save_file(mine, path / name)
        weight_map |= dict.fromkeys(mine, name)
    if index:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def run_script(wheel: Path, endpoint: str, tensor_parallel: int, *arguments: str, variables: dict[str, str]) -> None:
    """SGLang's script on `tensor_parallel` ranks, with the variables that torchrun sets. Raises RanksFailed."""
    argv = ["--endpoint", endpoint, "--inference-parallel-size", str(tensor_parallel), *arguments]
    run_ranks(_script, tensor_parallel, str(wheel), argv, env=variables)


def _script(rank: int, world_size: int, wheel: str, argv: list[str]) -> None:
    script = f"{wheel}/{FOLDER}/update.py"
    sys.argv = [script, *argv]
    sys.path.append(wheel)  # loguru
    runpy.run_path(script, run_name="__main__")


def torchrun_script(wheel: Path, endpoint: str, tensor_parallel: int, *arguments: str, variables: dict[str, str]) -> None:
    """The same as its users start it: one command, which calls torchrun."""
    command = [sys.executable, str(wheel / FOLDER / "update.py"), "--endpoint", endpoint]
    command += ["--inference-parallel-size", str(tensor_parallel), *arguments]
    environment = {
        **os.environ,
        **variables,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),  # torchrun's place
        "PYTHONPATH": os.pathsep.join([str(wheel), *filter(None, [os.environ.get("PYTHONPATH")])]),  # loguru
        "PET_MASTER_PORT": str(free_ports(2)),
        "OMP_NUM_THREADS": "1",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            output, _ = process.communicate()
            raise AssertionError(f"the script did not end in {SECONDS:g} s; it said:\n{output}") from None
    assert process.returncode == 0, output


def test_one_rank_from_files_and_saved_metas(wheel: Path, version: str, tmp_path: Path) -> None:
    tensors = checkpoint(1)
    folder, metas = save(tmp_path / "checkpoint", tensors, 2, index=False), tmp_path / "metas.pickle"
    with sglang_engine(wheel, 1, ping=PING[version]) as engine:
        what = ["--checkpoint-path", str(folder), "--save-metas-file", str(metas)]
        run_script(wheel, engine.url, 1, *what, variables=SMALL)
        assert engine.weights == expected(tensors, 1, draft=False)
        assert engine.pings == [PING[version]]
        assert [(r["flush_cache"], r["weight_version"], len(r["zmq_handles"])) for r in engine.requests] == [(True, None, 1)]

        saved = pickle.loads(metas.read_bytes())  # noqa: S301  (as SGLang's script does)
        assert isinstance(saved, Manifest)
        assert {t.name for r in saved.ranks for g in r.regions for t in g.tensors} == set(tensors)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_peer_to_peer_is_refused_by_name(wheel: Path, version: str, tmp_path: Path, tensor_parallel: int) -> None:
    """Both ways to ask for it: `--update-method all`, after a broadcast, and a joiner that registers nothing, gathers, loads
    metas from a file and asks for ranks. The engine keeps what it has."""
    tensors, metas = checkpoint(1), tmp_path / "metas.pickle"
    folder = save(tmp_path / "checkpoint", tensors, 2)
    with sglang_engine(wheel, tensor_parallel) as engine:
        broadcast_then_p2p = ["--checkpoint-path", str(folder), "--update-method", "all", "--save-metas-file", str(metas)]
        for arguments in (broadcast_then_p2p, ["--load-metas-file", str(metas)]):
            with pytest.raises(RanksFailed) as caught:
                run_script(wheel, engine.url, tensor_parallel, *arguments, variables=BROADCAST)
            assert len(caught.value.tracebacks) == tensor_parallel
            for text in caught.value.tracebacks.values():
                assert "name no rank that can be read: see CHECKPOINT_ENGINE_PEER_READS there" in text
            assert len(engine.requests) == 1
            assert engine.weights == expected(tensors, tensor_parallel, draft=False)


def test_two_ranks_with_a_draft_model(wheel: Path, version: str, tmp_path: Path) -> None:
    """By torchrun; then a checkpoint that the model's loader refuses; then another, loaded straight from the servers' memory."""
    first, second = checkpoint(1), checkpoint(2)
    bad = {**checkpoint(3), "model.layers.1.mlp.up_proj.weight": torch.zeros(8, 8, dtype=torch.bfloat16)}
    folders = [str(save(tmp_path / str(i), tensors, 3)) for i, tensors in enumerate([first, bad, second])]
    with sglang_engine(wheel, 2, draft=True, ping=PING[version]) as engine:
        versioned = ["--checkpoint-path", folders[0], "--weight-version", "w1"]
        torchrun_script(wheel, engine.url, 2, *versioned, variables=BROADCAST)
        assert engine.weights == expected(first, 2, draft=True)
        assert (engine.requests[0]["weight_version"], len(engine.requests[0]["zmq_handles"])) == ("w1", 2)

        with pytest.raises(RanksFailed) as caught:
            run_script(wheel, engine.url, 2, "--checkpoint-path", folders[1], variables=BROADCAST)
        assert len(caught.value.tracebacks) == 2
        for text in caught.value.tracebacks.values():
            assert "Failed to update weights due to remote errors" in text
            assert "model.layers.1.mlp.up_proj.weight: a shard of (4, 8) for a parameter of (48, 64)" in text

        run_script(wheel, engine.url, 2, "--checkpoint-path", folders[2], variables=SMALL)
        assert engine.weights == expected(second, 2, draft=True)
        assert len(engine.requests) == 3


def test_a_file_for_one_of_two_ranks(wheel: Path, version: str, tmp_path: Path) -> None:
    """The script's second rank registers nothing then."""
    tensors = checkpoint(4)
    folder = save(tmp_path / "checkpoint", tensors, 1, index=False)
    with sglang_engine(wheel, 2, ping=PING[version]) as engine:
        run_script(wheel, engine.url, 2, "--checkpoint-path", str(folder), variables=BROADCAST)
        assert engine.weights == expected(tensors, 2, draft=False)
