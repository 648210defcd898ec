"""`checkpoint-engine join`: a new engine gets real weights from the servers of a running world, by its REST API or a file."""

from __future__ import annotations

import io
import json
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import pytest
from torch.distributed import TCPStore

from checkpoint_engine import cli
from checkpoint_engine.cli.demo.checkpoint import read_checkpoint
from checkpoint_engine.cli.join import read_metas
from checkpoint_engine.engines.sglang import SGLang
from checkpoint_engine.errors import DeadlineError, PeerLostError, SettingsError
from checkpoint_engine.server.sources import Metas
from helpers.engines import engine_processes
from helpers.ports import free_ports
from helpers.ranks import Ranks, _context, run_ranks, start_ranks
from helpers.rest import Served, _Lines, model_dir, serving, wait_until_met

SECONDS = 20.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_dir(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def fleet(model: Path) -> Iterator[Served]:
    """Two servers that hold the checkpoint "first"."""
    with serving(2) as served:
        with served.client() as client:
            wait_until_met(client, 2)
            made = client.post("/v1/checkpoints", json={"name": "first", "directory": str(model)})
            assert made.status_code == 201, made.text
        yield served


def _command(rank: int, world_size: int, arguments: list[str]) -> tuple[int, str, str]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = cli.run(["join", *arguments])
    return code, out.getvalue(), err.getvalue()


def join(source: str, urls: list[str], *options: str) -> list[Any]:
    endpoints = [word for url in urls for word in ("--endpoint", url)]
    env = {"CHECKPOINT_ENGINE_BUCKET_BYTES": "4096", "CHECKPOINT_ENGINE_CONNECT_TIMEOUT": "5"}
    return run_ranks(_command, len(urls), ["--from", source, *endpoints, "--wait", "20", *options], env=env)


def digests_of(urls: list[str]) -> list[dict[str, str]]:
    seen = []
    for url in urls:
        with closing(SGLang(url)) as client:
            seen.append(client.request("GET", "/v1/parameters/digest", None, SECONDS).json())
    return seen


def expected(model: Path) -> dict[str, str]:
    from checkpoint_engine.engines.embedded.loader import expected_digests
    from checkpoint_engine.engines.embedded.model import ServedModel

    return expected_digests(ServedModel.load(model, "dummy").targets, read_checkpoint(model))


@pytest.mark.timeout(120)
def test_engines_join_a_running_world(fleet: Served, model: Path, tmp_path: Path) -> None:
    with engine_processes(model, [[]] * 2) as urls:
        assert expected(model) not in digests_of(urls)
        ((code, out, said),) = join(fleet.url, urls[:1], "--json", "--weight-version", "v1")
        assert (code, said.count("error")) == (0, 0), said
        report = json.loads(out)
        assert report["version"] == "v1"
        assert report["method"] == "p2p (shm)"
        assert digests_of(urls[:1]) == [expected(model)]
        with fleet.client() as client:
            (tmp_path / "metas.json").write_bytes(client.get("/v1/manifest", params={"checkpoint": "first"}).content)
        results = join(str(tmp_path / "metas.json"), urls)  # as a replica of one rank each, in a world of two
        assert [code for code, _, _ in results] == [0, 0], results
        assert "by p2p (shm)" in results[0][1]
        assert digests_of(urls) == [expected(model)] * 2


@contextmanager
def staying(source: str, urls: list[str]) -> Iterator[Ranks]:
    """`join --serve`, once it says that it is listed."""
    env = {"CHECKPOINT_ENGINE_BUCKET_BYTES": "4096", "CHECKPOINT_ENGINE_CONNECT_TIMEOUT": "5"}
    mine, theirs = _context.Pipe(duplex=False)
    endpoints = [word for url in urls for word in ("--endpoint", url)]
    arguments = ["join", "--from", source, *endpoints, "--wait", "20", "--serve"]
    with start_ranks(_say_all, len(urls), arguments, [theirs] * len(urls), env=env, may_die=range(len(urls))) as ranks:
        while "later joiners are told of this one" not in (line := heard(mine)):
            assert "error" not in line
        yield ranks


def _say_all(rank: int, world_size: int, arguments: list[str], pipes: list[Connection]) -> int:
    with redirect_stdout(_Lines(pipes[rank])), redirect_stderr(_Lines(pipes[rank])):
        return cli.run(arguments)


def heard(pipe: Connection) -> str:
    assert pipe.poll(2 * SECONDS)
    line: str = pipe.recv()
    return line


def holders_of(client: httpx.Client) -> int:
    return Metas.from_json(client.get("/v1/manifest", params={"checkpoint": "first"}).content).world_size


@pytest.mark.timeout(180)
def test_a_joiner_that_stays_is_read_by_the_next(model: Path) -> None:
    """It is listed while it lives; killed, until its lease ends; told to go, no longer."""
    lease = {"CHECKPOINT_ENGINE_HOLDER_LEASE": "3"}
    with engine_processes(model, [[]] * 2) as urls, serving(2, env=lease) as fleet, fleet.client() as client:
        wait_until_met(client, 2)
        made = client.post("/v1/checkpoints", json={"name": "first", "directory": str(model)})
        assert made.status_code == 201, made.text
        with staying(fleet.url, urls) as ranks:  # two ranks, each of which holds a part
            assert holders_of(client) == 4
            assert digests_of(urls) == [expected(model)] * 2
            ((code, out, said),) = join(fleet.url, urls[:1], "--json")
            assert code == 0, said
            assert json.loads(out)["nbytes"] == sum(t.nbytes for t in read_checkpoint(model).values())  # each byte once
            ((code, _, said),) = join(fleet.url, urls[:1], "--avoid", "0", "--avoid", "1")  # from the joiners alone
            assert code == 0, said
            for rank in (1, 0):
                ranks.kill(rank)
            ((code, _, said),) = join(fleet.url, urls[:1])  # still listed, and replaced
            assert code == 0, said
            deadline = time.monotonic() + SECONDS
            while holders_of(client) != 2:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        with staying(fleet.url, urls[:1]) as ranks:
            assert holders_of(client) == 3
            ranks.kill(0, signal.SIGTERM)
            assert ranks.results() == [128 + signal.SIGTERM]
            assert holders_of(client) == 2
        assert digests_of(urls[:1]) == [expected(model)]


@pytest.mark.timeout(120)
def test_metas_from_a_store(fleet: Served, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are whatever somebody put into a store of torch's under some key."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with fleet.client() as client:
        store.set("metas/first", client.get("/v1/manifest", params={"checkpoint": "first"}).content)
    with engine_processes(model, [[]]) as urls:
        ((code, _, said),) = join(f"store://127.0.0.1:{store.port}/metas/first", urls)
        assert code == 0, said
        assert digests_of(urls) == [expected(model)]
    monkeypatch.setattr("checkpoint_engine.cli.join.CALL_SECONDS", 0.5)
    for source, kind, words in [
        (f"store://127.0.0.1:{store.port}/other", DeadlineError, "'other' to be set in the store at 127.0.0.1"),
        (f"store://127.0.0.1:{free_ports(1)}/metas/first", PeerLostError, "the store at 127.0.0.1:"),
        (f"store://127.0.0.1:{store.port}/", SettingsError, "is not store://HOST:PORT/KEY"),
        ("store://127.0.0.1:x/a", SettingsError, "store://127.0.0.1:x/a"),
    ]:
        with pytest.raises(kind, match=words):
            read_metas(source)


def test_what_cannot_be_joined(fleet: Served, tmp_path: Path) -> None:
    (tmp_path / "not.json").write_text("{")
    nobody = f"http://127.0.0.1:{free_ports(1)}"
    engine = ["http://127.0.0.1:1"]
    for source, options, code, words in [
        (str(tmp_path / "not.json"), (), 2, "not.json has no metas"),
        (str(tmp_path / "none.json"), (), 2, "No such file"),
        (fleet.url, ("--name", "other"), 2, "checkpoint 'other' is not registered"),
        (nobody, (), 4, f"the server at {nobody} is gone"),
        (fleet.url, ("--wait", "0.3"), 3, "engine at http://127.0.0.1:1: "),
        (fleet.url, ("--avoid", "7"), 2, "have ranks 0 to 1, not [7]"),
        (str(tmp_path / "not.json"), ("--serve",), 2, "--serve needs --from URL"),
    ]:
        ((found, _, said),) = join(source, engine, *options)
        assert (found, words in said) == (code, True), said


def test_nonsense_is_not_listed(fleet: Served) -> None:
    with fleet.client() as client:
        before = client.get("/v1/manifest", params={"checkpoint": "first"}).content
        for body in (b"{", b"{}", before[:-1], json.dumps({**json.loads(before), "offers": []}).encode()):
            assert client.put("/v1/holders/0123456789", content=body).status_code == 400
        assert client.put("/v1/holders/0", content=before).status_code == 422
        assert client.post("/v1/holders/0123456789/renew").status_code == 404
        assert client.delete("/v1/holders/0123456789").status_code == 200
        assert client.get("/v1/manifest", params={"checkpoint": "first"}).content == before
