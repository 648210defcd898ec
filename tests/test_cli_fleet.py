"""Commands that drive a serving fleet by REST: register, status, update --url, watch, trace; and completion of them all."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_engine import cli
from checkpoint_engine.cli.fleet_client import problem_code
from checkpoint_engine.timeline import from_chrome
from helpers.chrome import check_chrome
from helpers.engines import engine_processes
from helpers.rest import SECONDS, Served, gated, model_dir, serving, until, wait_until_met

RANKS = 2
SPOILT = "encoder.layer.1.output.dense.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_dir(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def engines(model: Path) -> Iterator[list[str]]:
    with engine_processes(model, [[]] * RANKS) as urls:
        yield urls


@pytest.fixture(scope="module")
def fleet(model: Path) -> Iterator[Served]:
    with serving(RANKS, env={"CHECKPOINT_ENGINE_BUCKET_BYTES": "4096"}) as served:
        with served.client() as client:
            wait_until_met(client, RANKS)
        yield served


@pytest.fixture
def run(fleet: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command against the fleet: (exit code, stdout, stderr)."""
    monkeypatch.setenv("CHECKPOINT_ENGINE_URL", fleet.url)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: str) -> tuple[int, str, str]:
        code = cli.run(arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def update(fleet: Served, urls: list[str], checkpoint: str, *options: str) -> list[str]:
    endpoints = [word for url in urls for word in ("--endpoint", url)]
    return ["update", "--url", fleet.url, "--checkpoint", checkpoint, *endpoints, *options]


def test_from_registering_to_a_trace(fleet: Served, run: Any, engines: list[str], model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    code, out, _ = run("register", str(model), "--name", "first", "--json")
    assert (code, json.loads(out)["tensors"], len(json.loads(out)["parts"])) == (0, len(tensors), RANKS)
    code, out, err = run("register", str(model), "--name", "first")
    assert (code, out) == (2, "")
    assert err.startswith("checkpoint-engine: error: CheckpointExistsError: ") and err.count("\n") == 1
    code, out, _ = run("status")
    assert code == 0
    assert out.startswith("2 ranks; server ") and "first" in out and "update" not in out

    code, out, err = run(*update(fleet, engines, "first", "--pause", "keep", "--weight-version", "v1", "--json"))
    assert code == 0, err
    report = json.loads(out)
    assert (report["version"], report["method"]) == ("v1", "copies")
    assert [replica["endpoint"] for replica in report["replicas"]] == engines

    code, out, _ = run("status", "--json")
    told = json.loads(out)
    assert code == 0
    assert [rank["state"]["version"] for rank in told["fleet"]["ranks"]] == ["v1"] * RANKS
    assert [(engine["endpoint"], engine["version"]) for engine in told["engines"]] == [(url, "v1") for url in engines]
    assert (told["last"]["state"], told["last"]["timeline"]) == ("committed", True)

    trace = tmp_path / "t.json"
    id_ = told["last"]["id"]
    assert run("trace", "get", "--output", str(trace))[0] == 0
    check_chrome(trace.read_bytes())
    with fleet.client() as rest:
        timeline = rest.get(f"/v1/updates/{id_}/timeline").json()
        assert rest.get(f"/v1/updates/{id_}/trace").content == trace.read_bytes()
    read = from_chrome(trace.read_bytes())
    assert [len(rank["spans"]) for rank in timeline["ranks"]] == [len(t.spans) for t in read.ranks]
    assert (
        {s["stage"] for rank in timeline["ranks"] for s in rank["spans"]} == set(timeline["stages"]) >= {"lift", "share", "load"}
    )
    nbytes = sum(t.nbytes for t in tensors.values())
    loads = [sum(s["nbytes"] for s in rank["spans"] if s["stage"] == "load") for rank in timeline["ranks"]]
    assert loads == [nbytes * report["passes"]] * RANKS  # its first update: recorded, and proved
    code, out, _ = run("trace", "summary", str(trace))
    assert code == 0
    assert out.startswith("v1 by copies: ") and timeline["bound"] in out

    # Again, with the trace at once; what watch says of an update that is over is the same.
    direct = tmp_path / "d.json"
    code, out, _ = run(*update(fleet, engines, "first", "--weight-version", "v2", "--trace", str(direct)))
    assert (code, from_chrome(direct.read_bytes()).version) == (0, "v2")
    assert "v2 by copies" in out
    code, out, _ = run("watch", id_)
    assert code == 0
    assert "v1 by copies" in out


@contextlib.contextmanager
def watching(url: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`watch --json` as a process of its own."""
    command = [sys.executable, "-m", "checkpoint_engine", "watch", "--url", url, "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_watching_an_update_while_it_runs(fleet: Served, run: Any, engines: list[str], model: Path) -> None:
    assert run("register", str(model), "--name", "watched")[0] == 0
    with gated(engines[1]) as (front, asked, may), fleet.client() as rest:
        body = {"checkpoint": "watched", "version": "v3", "engines": [{"url": engines[0]}, {"url": front}]}
        assert rest.post("/v1/updates", json=body).status_code == 202
        assert asked.wait(SECONDS)
        code, out, _ = run("status")
        assert code == 0
        assert "of watched is updating: 0 B of " in out
        code, out, err = run(*update(fleet, engines, "watched"))
        assert (code, "UpdateInProgressError" in err) == (1, True)
        with watching(fleet.url) as process:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["state"] == "updating"
            may.set()
            out, err = process.communicate(timeout=SECONDS)
    last = json.loads(out.splitlines()[-1])
    assert (process.returncode, err, last["state"], last["report"]["version"]) == (0, "", "committed", "v3")
    code, out, err = run("watch")
    assert (code, out) == (2, "")
    assert "no update is running" in err


def test_watching_for_the_next_one_which_is_cancelled(fleet: Served, run: Any, engines: list[str], model: Path) -> None:
    assert run("register", str(model), "--name", "cancelled")[0] == 0
    with gated(engines[1]) as (front, asked, _), fleet.client() as rest, watching(fleet.url, "--next") as process:
        body = {"checkpoint": "cancelled", "engines": [{"url": engines[0]}, {"url": front}]}
        id_ = rest.post("/v1/updates", json=body).json()["id"]
        assert asked.wait(SECONDS)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["id"] == id_
        rest.delete(f"/v1/updates/{id_}")
        out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, json.loads(out.splitlines()[-1])["state"]) == (1, "cancelled")
    assert f"update {id_} was cancelled" in err


def test_a_failed_update_and_what_it_leaves(fleet: Served, run: Any, engines: list[str], model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[SPOILT] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    assert run("register", str(tmp_path), "--name", "spoilt")[0] == 0
    code, out, err = run(*update(fleet, engines, "spoilt", "--pause", "keep", "--json", "--trace", str(tmp_path / "none.json")))
    assert (code, out) == (1, "")
    assert SPOILT in err and "stays paused: its weights are a mixture" in err
    assert not (tmp_path / "none.json").exists()
    code, out, _ = run("status")
    assert (code, "dirty" in out) == (1, True)
    with fleet.client() as rest:
        id_ = rest.get("/v1/updates").json()[0]["id"]
        assert rest.get(f"/v1/updates/{id_}/timeline").status_code == 404
        assert rest.get("/v1/updates/none/trace").status_code == 404
    assert run("watch", id_)[0] == 1
    code, _, err = run("trace", "get", id_)
    assert (code, "has no timeline" in err) == (2, True)
    code, out, _ = run(*update(fleet, ["http://127.0.0.1:1", engines[1]], "spoilt", "--wait", "0.3"))
    assert code == 3
    assert run("register", str(model), "--name", "good")[0] == 0
    assert run(*update(fleet, engines, "good", "--pause", "keep", "--weight-version", "v4"))[0] == 0
    assert run("status")[0] == 0
    code, _, err = run(*update(fleet, engines, "spoilt", "--pause", "keep", "--restore"))
    assert (code, SPOILT in err, "'v4' was restored" in err) == (1, True, True)
    assert run("status")[0] == 0


def test_a_rank_that_is_gone(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(RANKS, may_die=[1]) as served, served.client() as client:
        monkeypatch.setenv("CHECKPOINT_ENGINE_URL", served.url)
        wait_until_met(client, RANKS)
        served.ranks.kill(1)
        until(client, "/v1/events", lambda data: isinstance(data, dict) and data["ranks"][-1]["error"] is not None)
        code, out, _ = run("status")
    assert code == 4
    assert "the server of rank 1 " in out


def test_tokens_and_sockets(run: Any, tmp_path: Path, socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("a-secret-of-some-length\n")
    path = socket_dir / "rest.sock"
    with serving(1, "--uds", str(path), "--token-file", str(token)):
        code, _, err = run("status", "--uds", str(path))
        assert (code, "Unauthorized" in err, "give the token by --token-file" in err) == (2, True, True)
        assert run("status", "--uds", str(path), "--token-file", str(token))[0] == 0
        monkeypatch.setenv("CHECKPOINT_ENGINE_SERVE_TOKEN", token.read_text().strip())
        assert run("status", "--uds", str(path))[0] == 0
    code, _, err = run("watch", "--uds", str(path))
    assert (code, "is gone" in err) == (4, True)


@pytest.mark.parametrize("token", ["a-secret-of-some-length\nand another", "sécret-of-some-length"])
def test_a_token_that_no_header_can_hold_is_not_told(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    (tmp_path / "token").write_text(token)
    told = [run("status", "--url", "http://127.0.0.1:1", "--token-file", str(tmp_path / "token"))]
    monkeypatch.setenv("CHECKPOINT_ENGINE_SERVE_TOKEN", token)
    told.append(run("join", "--from", "http://127.0.0.1:1", "--endpoint", "http://127.0.0.1:1"))
    for code, _, err in told:
        assert (code, "cret-of" in err, "on one line" in err) == (2, False, True)


def test_servers_that_are_none(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedded_support import answering

    for url in ("http://127.0.0.1:1", "not a url", "ftp://h/"):
        monkeypatch.setenv("CHECKPOINT_ENGINE_URL", url)
        code, _, err = run("status")
        assert (code, err.count("\n")) == (4 if url.startswith("http") else 2, 1)
    with answering(lambda method, path, body: (200, b"<html>")) as url:
        monkeypatch.setenv("CHECKPOINT_ENGINE_URL", url)
        code, _, err = run("status")
    assert (code, "answered what is not JSON: <html>" in err) == (4, True)


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("UpdateError", 500, 1),
        ("CheckpointNotFoundError", 404, 2),
        ("ReplicaError", 502, 3),
        ("PeerLostError", 503, 4),
        ("NotMetError", 503, 4),
        ("NotFoundError", 404, 2),
        ("RequestValidationError", 422, 2),
        ("KeyError", 500, 1),
        ("annotations", 500, 1),
    ],
)
def test_exit_codes_of_a_servers_errors(kind: str, status: int, code: int) -> None:
    assert problem_code({"type": kind}, status) == code


def test_a_timeline_that_cannot_be_written_does_not_hide_the_report(
    fleet: Served, run: Any, engines: list[str], model: Path, tmp_path: Path
) -> None:
    assert run("register", str(model), "--name", "told")[0] == 0
    code, out, err = run(*update(fleet, engines, "told", "--json", "--trace", str(tmp_path / "none" / "trace.json")))
    assert (code, "cannot be written" in err) == (2, True)
    assert json.loads(out)["version"].startswith("told@")


@pytest.mark.parametrize("option", ["--inference-parallel-size", "--name", "--restore-from"])
def test_what_update_does_not_take_with_a_fleet(run: Any, option: str) -> None:
    code, _, err = run("update", "--url", "http://127.0.0.1:1", "--checkpoint", "first", option, "1")
    assert (code, f"{option} does not go with --url" in err) == (2, True)
    code, _, err = run("update", "--checkpoint", "first", "--restore")
    assert (code, "--restore goes with --url only" in err) == (2, True)


def test_what_update_needs_without_a_fleet(run: Any) -> None:
    code, _, err = run("update", "--checkpoint", "/none")
    assert code == 2
    assert "--inference-parallel-size" in err


# --- completion ---------------------------------------------------------------------------------------------------------

COMPLETE = """
import os, sys
os.environ.update(COMP_WORDS="checkpoint-engine " + sys.argv[1], COMP_CWORD=sys.argv[2])
os.environ["_CHECKPOINT_ENGINE_COMPLETE"] = "complete_bash"
from checkpoint_engine import cli
code = cli.run([])
print(sorted({"torch", "fastapi", "transformers"} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def complete(words: str, position: int) -> tuple[list[str], str]:
    """What bash would be offered, and which of the heavy modules that took."""
    done = subprocess.run(
        [sys.executable, "-c", COMPLETE, words, str(position)], capture_output=True, text=True, timeout=50, check=True
    )
    return done.stdout.split(), done.stderr.strip()


@pytest.mark.parametrize(
    ("words", "position", "offered"),
    [
        ("", 1, list(cli.COMMANDS)),
        ("re", 1, ["register"]),
        ("--v", 1, ["--version"]),
        ("trace ", 2, ["summary", "get"]),
        ("watch --n", 2, ["--next"]),
        ("status --to", 2, ["--token-file"]),
    ],
)
def test_completion_imports_nothing_heavy(words: str, position: int, offered: list[str]) -> None:
    assert complete(words, position) == (offered, "[]")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_for_each_shell(shell: str) -> None:
    module = [sys.executable, "-m", "checkpoint_engine", "--show-completion", shell]
    named = {
        **os.environ,
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }  # else it is the shell that started pytest, if any
    shown = subprocess.run(module, capture_output=True, text=True, timeout=50, check=True, env=named).stdout
    assert "_CHECKPOINT_ENGINE_COMPLETE" in shown and "checkpoint-engine" in shown
