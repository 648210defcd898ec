"""README and docs/: every command and every program in them is run, as it stands but for places of this host.

A fenced block is known by how it begins. It is in RUN, with what runs it, or in NOT_RUN, with the reason. One that is in neither
fails: say which it is.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from checkpoint_engine.cli import COMMANDS
from checkpoint_engine.engines.embedded.model import ServedModel
from embedded_support import save_llama
from helpers.engines import engine_processes
from helpers.ports import free_ports
from helpers.processes import BIN, started, until_said, url_of
from helpers.rest import gated, model_dir, wait_until_met
from helpers.tools import tool

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
SECONDS = 120.0

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Block:
    page: str
    text: str

    @property
    def key(self) -> str:
        return f"{self.page}: {' / '.join(line.strip() for line in self.text.splitlines())}"

    @property
    def commands(self) -> list[str]:
        """Lines of shell, comments dropped and continued ones joined."""
        joined = self.text.replace("\\\n", " ")
        return [line for raw in joined.splitlines() if (line := re.sub(r"(^|\s)# .*", "", raw).strip())]


def blocks() -> dict[str, Block]:
    found = {}
    for page in PAGES:
        for match in re.finditer(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            block = Block(page.relative_to(ROOT).as_posix(), match[1])
            assert block.key not in found, f"two blocks begin alike: {block.key}"
            found[block.key] = block
    return found


BLOCKS = blocks()
RUN: dict[str, Callable[..., None]] = {}
NOT_RUN = {
    "README.md: make demo": "test_demo runs the demo; `make test` is what runs this",
    "README.md: checkpoint on disk, trainer's tensors": "a picture",
    "docs/contributing.md: make check": "CI runs them; test-vllm has a job of its own",
    "docs/faults.md: ps.regroup": "part of a program; test_regroup has all of it",
    "docs/notes-cuda.md: from checkpoint_engine.devices.nccl": "part of a program; needs GPUs",
    "docs/notes-cuda.md: GUARD": "part of a program; needs GPUs",
    'docs/operate.md: {"id"': "an answer, shortened; test_http_updates has the route",
    "docs/peer.md: make demo": "one builds an environment, one ends by a signal: test_demo and test_p2p_join run the same",
    "docs/peer.md: ps.load_metas": "part of a program; test_p2p_update has all of it",
    "docs/peer.md: with PeerServer": "part of a program; test_peer_server has all of it",
    "docs/recorded-loads.md: record   the loader": "a table",
    "docs/recorded-loads.md: update_weights_from_ipc": "part of a program; test_recorded_session has all of it",
    "docs/recorded-loads.md: from checkpoint_engine.loads.model": "part of a program; test_recorded_loads has all of it",
    "docs/sglang.md: pip install": "needs the network; test_sglang_dropin installs the wheels",
    "docs/sglang.md: python -m sglang": "needs SGLang and GPUs; test_sglang_dropin runs its script",
    "docs/structure.md: __main__": "a picture",
    "docs/vllm.md: ": "needs vLLM; tests/vllm_cpu starts it so",
}


def runs(key: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def note(test: Callable[..., None]) -> Callable[..., None]:
        RUN[key] = test
        return test

    return note


def block(key: str) -> Block:
    """The one that begins so."""
    (found,) = (b for k, b in BLOCKS.items() if k.startswith(key))
    return found


def commands(key: str) -> list[str]:
    return block(key).commands


def test_every_block_is_run_or_there_is_a_reason() -> None:
    known = (*RUN, *NOT_RUN)
    assert [key for key in BLOCKS if not key.startswith(known)] == []
    stale = [key for key in known if not any(k.startswith(key) for k in BLOCKS) and key != "docs/vllm.md: "]
    assert stale == []


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    dead = []
    for page in (*PAGES, ROOT / "CHANGELOG.md", *ROOT.glob("benchmarks/*.md")):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
                dead.append(f"{page.relative_to(ROOT)}: {link}")
    assert dead == []


# --- places of this host -------------------------------------------------------------------------------------------------


@dataclass
class Site:
    """model: a checkpoint, DIR of the docs; engines: two that serve its kind of model, with random weights."""

    model: Path
    engines: list[str]
    here: Path

    def shell(self, command: str, **options: str) -> str:
        """What it prints. Ports that the docs have are not this host's."""
        port = {"MASTER_PORT": str(free_ports(3))}
        command = command.replace("torchrun ", f"torchrun --master-port {port['MASTER_PORT']} ")
        path = os.pathsep.join([str(BIN), os.environ["PATH"]])
        env = {**os.environ, **port, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), **options}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=self.here, env=env, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def serves(self, *urls: str) -> None:
        """These engines have the checkpoint."""
        expected = ServedModel.load(self.model).targets.digests()
        for url in urls:
            assert httpx.get(f"{url}/v1/parameters/digest", timeout=SECONDS, trust_env=False).json() == expected


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    model = model_dir(tmp_path / "model")
    with engine_processes(model, [[]] * 2) as engines:
        yield Site(model, engines, tmp_path)


def as_here(command: str, changes: dict[str, str]) -> str:
    for said, meant in changes.items():
        command = command.replace(said, meant)
    return command


# --- README --------------------------------------------------------------------------------------------------------------

COMMAND_BLOCK = "README.md: checkpoint-engine demo"


def command(name: str) -> str:
    """The README's line for a command, with what is optional and of several ways the first."""
    (line,) = (c for c in commands(COMMAND_BLOCK) if re.search(rf"(checkpoint-engine|checkpoint_engine) (\w+\|)*{name}\b", c))
    return re.sub(r"\[(.*?)\]", r"\1", line).replace("URL|FILE", "URL").replace("status|watch", name)


@runs(COMMAND_BLOCK)
def test_all_commands_of_the_readme_are_known_here() -> None:
    named = set()
    for line in commands(COMMAND_BLOCK):
        (words,) = re.findall(r"(?:checkpoint-engine|checkpoint_engine) ([a-z|]+)", line)
        named |= set(words.split("|"))
    assert named == set(COMMANDS) - {"plan"}  # which docs/cost-model.md has


def test_demo(tmp_path: Path) -> None:
    site = Site(save_llama(tmp_path / "model"), [], tmp_path)
    assert json.loads(site.shell(as_here(command("demo"), {"DIR": str(site.model)})))["ok"]


def test_inspect_and_probe(tmp_path: Path) -> None:
    site = Site(save_llama(tmp_path / "model"), [], tmp_path)
    shown = json.loads(site.shell(as_here(command("inspect"), {"DIR": str(site.model), "--ranks N": "--ranks 2"})))
    assert shown
    assert json.loads(site.shell(command("probe")))["memcpy"] > 0


def test_engine_and_update(site: Site) -> None:
    own = {"DIR": str(site.model), "--port 8001": "--port 0"}
    words = shlex.split(as_here(command("engine"), own))
    with started([str(BIN / words[0]), *words[1:]]) as lines:
        ports = {"http://127.0.0.1:8001": url_of(lines), "http://127.0.0.1:8002": site.engines[0], "DIR": str(site.model)}
        assert "GB/s" in site.shell(as_here(command("update --checkpoint"), ports))
        site.serves(*list(ports.values())[:2])


def test_serve_and_join(site: Site) -> None:
    """A new engine has the version of a fleet that never asked its own."""
    words = shlex.split(command("serve").replace("--nproc-per-node 8", f"--nproc-per-node 2 --master-port {free_ports(3)}"))
    with started([str(BIN / words[0]), *words[1:], "--port", "0"]) as lines:
        url = url_of(lines)
        with httpx.Client(base_url=url, trust_env=False, timeout=SECONDS) as rest:
            wait_until_met(rest, 2)
            rest.post("/v1/checkpoints", json={"name": "first", "directory": str(site.model)}).raise_for_status()
            for line, engine in zip(
                (command("join"), commands("docs/peer.md: checkpoint-engine join")[0]), site.engines, strict=True
            ):
                changes = {"URL": url, "http://HOST:8600": url, "http://127.0.0.1:8003": engine, "http://NEW:30000": engine}
                site.shell(as_here(line, changes))
                site.serves(engine)
            (site.here / "metas.json").write_bytes(rest.get("/v1/manifest").content)
            for line in commands("docs/peer.md: checkpoint-engine join")[1:]:
                changes = {"http://NEW:30000": site.engines[0], "--from ...": f"--from {url}", "...": site.engines[0]}
                line = line.replace("--nproc-per-node 8", "--nproc-per-node 1").replace("-parallel-size 8", "-parallel-size 1")
                site.shell(as_here(line, changes))


RUN["docs/peer.md: checkpoint-engine join"] = test_serve_and_join


@runs("README.md: DIR=")
def test_a_fleet_to_look_at(tmp_path: Path) -> None:
    """With a model of our own for the demo's, which is 90 MB."""
    first, *rest = commands("README.md: DIR=")
    site = Site(model_dir(tmp_path / "model"), [], tmp_path)
    assert "sentence_bert_config" in "".join(site.shell(f"{first}; ls $DIR").split())
    changes = {"$DIR": str(site.model), "--port 8001": "--port 0", "--port 8002": "--port 0"}
    with ExitStack() as stack:
        for name in ("http://127.0.0.1:8001", "http://127.0.0.1:8002", "http://127.0.0.1:8600"):
            words = shlex.split(as_here(rest.pop(0).removesuffix(" &"), changes))
            if words[0] == "torchrun":
                words = [words[0], "--master-port", str(free_ports(3)), *words[1:], "--port", "0"]
            changes[name] = url_of(stack.enter_context(started([str(BIN / words[0]), *words[1:]])))
        url = changes["http://127.0.0.1:8600"]
        with httpx.Client(base_url=url, trust_env=False, timeout=SECONDS) as client:
            wait_until_met(client, 2)
        for line in rest:
            assert site.shell(as_here(line, changes), CHECKPOINT_ENGINE_URL=url)
        site.serves(changes["http://127.0.0.1:8001"], changes["http://127.0.0.1:8002"])


@runs("README.md: from transformers import AutoModel")
def test_a_trainer_pushes(site: Site) -> None:
    text = block("README.md: from transformers import AutoModel").text
    program = site.here / "train.py"
    program.write_text(as_here(text, {'"DIR"': repr(str(site.model)), "http://127.0.0.1:8001": site.engines[0]}))
    assert "step-2" in site.shell("torchrun --nproc-per-node 1 train.py")
    site.serves(site.engines[0])


@runs("README.md: import sys")
def test_the_contracts_calls(site: Site) -> None:
    program = site.here / "release.py"
    program.write_text(as_here(block("README.md: import sys").text, {"http://127.0.0.1:8001": site.engines[0]}))
    assert "release@" in site.shell(f"torchrun --nproc-per-node 1 release.py {site.model}/model.safetensors")
    site.serves(site.engines[0])


# --- docs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def url(site: Site) -> Iterator[str]:
    """Of a fleet of two ranks, started as docs/operate.md says, with ceilings."""
    measure, serve = commands("docs/operate.md: checkpoint-engine probe --json > ceilings.json / torchrun")
    site.shell(measure)
    install, first = commands("docs/operate.md: pip install")
    assert install == "pip install 'ckpt-engine[server]'"  # which was done to run this
    assert serve.startswith(first)
    words = shlex.split(serve.replace("--nproc-per-node 8", f"--nproc-per-node 2 --master-port {free_ports(3)}"))
    words[-1] = str(site.here / words[-1])
    with started([str(BIN / words[0]), *words[1:], "--port", "0"]) as lines:
        url = url_of(lines)
        with httpx.Client(base_url=url, trust_env=False, timeout=SECONDS) as rest:
            wait_until_met(rest, 2)
            assert set(rest.get("/v1/fleet").json()["ceilings"]) >= {"lift", "load"}
        yield url


RUN["docs/operate.md: pip install"] = RUN["docs/operate.md: checkpoint-engine probe --json > ceilings.json / torchrun"] = url


@runs("docs/operate.md: curl")
def test_driving_a_fleet_by_curl(site: Site, url: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    changes = {"localhost:8600": url, "/models/step-12": str(site.model), '"kind": "vllm"': '"kind": "sglang"'}
    engines = '"url": "{}"}}, {{"kind": "sglang", "url": "{}"'.format(*site.engines)
    register, begin, follow = (
        as_here(c, {**changes, '"url": "http://127.0.0.1:8000"': engines}) for c in commands("docs/operate.md: curl")
    )
    assert json.loads(site.shell(register))["name"] == "step-12"
    id_ = json.loads(site.shell(begin))["id"]
    assert '"state":"committed"' in site.shell(follow.replace("/ID/", f"/{id_}/"))
    site.serves(*site.engines)


@runs("docs/operate.md: checkpoint-engine probe --json > ceilings.json / checkpoint-engine trace")
@runs("docs/operate.md: checkpoint-engine register")
def test_driving_a_fleet_by_commands(site: Site, url: str) -> None:
    """Those of docs/operate.md, with CHECKPOINT_ENGINE_URL, and then those of the README."""
    endpoints = f"--engine sglang --endpoint {site.engines[0]} --endpoint {site.engines[1]}"
    changes = {
        "/models/step-12": str(site.model), "--engine vllm --endpoint http://127.0.0.1:8000": endpoints,
        "http://127.0.0.1:8600": url,
    }  # fmt: skip
    register, update, status, watch, *traces = (
        as_here(c, changes) for c in commands("docs/operate.md: checkpoint-engine register")
    )
    site.shell(register.replace(str(site.model), f"{site.model} --name step-12"), CHECKPOINT_ENGINE_URL=url)
    site.shell(update, CHECKPOINT_ENGINE_URL=url)
    site.serves(*site.engines)
    assert "step-12" in site.shell(status, CHECKPOINT_ENGINE_URL=url)
    assert watch == "checkpoint-engine watch"  # below, while something runs
    measure, summary = commands("docs/operate.md: checkpoint-engine probe --json > ceilings.json / checkpoint-engine trace")
    for line in (
        *traces,
        measure,
        summary,
        as_here(command("trace summary"), {"FILE --ceilings FILE": "trace.json --ceilings ceilings.json"}),
    ):
        printed = site.shell(line, CHECKPOINT_ENGINE_URL=url)
    assert "bounds the update" in printed or "No stage bounds" in printed
    for name in ("register", "status"):
        assert json.loads(
            site.shell(as_here(command(name), {"URL": url, "DIR": str(site.model)}).removesuffix("--json") + " --json")
        )
    with gated(site.engines[1]) as (front, asked, may):
        update = (
            f"{as_here(command('update --url'), {'URL': url, 'NAME': 'step-12'})} --endpoint {site.engines[0]} --endpoint {front}"
        )
        with started([str(BIN / word) if word == "checkpoint-engine" else word for word in shlex.split(update)]) as lines:
            assert asked.wait(SECONDS)
            watch = f"{command('watch').replace('URL', url)}"
            with started([str(BIN / word) if word == "checkpoint-engine" else word for word in shlex.split(watch)]) as seen:
                until_said(seen, '"updating"')  # it follows
                may.set()
                until_said(seen, '"committed"')
            until_said(lines, "step-12@")


@runs("docs/cost-model.md: checkpoint-engine plan")
def test_plan(tmp_path: Path) -> None:
    site = Site(save_llama(tmp_path / "model"), [], tmp_path)
    site.shell("checkpoint-engine probe --json > probe.json")
    *some, published = commands("docs/cost-model.md: checkpoint-engine plan")
    for line in some:
        assert site.shell(line.replace("/models/mine", str(site.model)))
    assert published.endswith(" --published")  # half a minute's work, of which test_cli_plan has the parts


@runs("docs/sglang.md: torchrun")
def test_update_of_one_replica_of_two_ranks(tmp_path: Path) -> None:
    """The engine stands in for SGLang: it is asked in the same words."""
    model = model_dir(tmp_path / "model")
    with engine_processes(model, [[]]) as [follower], engine_processes(model, [["--follower", follower]]) as [leader]:
        site = Site(model, [leader], tmp_path)
        (line,) = commands("docs/sglang.md: torchrun")
        site.shell(as_here(line, {"DIR": str(model), "http://127.0.0.1:19730": leader}))
        site.serves(leader, follower)


@runs("docs/integrators.md: import json")
def test_an_engine_of_ones_own(tmp_path: Path) -> None:
    site, page = Site(tmp_path, [], tmp_path), (ROOT / "docs" / "integrators.md").read_text()
    for name, key in (("tiny_engine.py", "import json"), ("tiny_update.py", "import sys")):
        assert f"`{name}`" in page
        (tmp_path / name).write_text(block(f"docs/integrators.md: {key}").text)
    (first,) = re.findall(r"run as `python (tiny_engine.py) 8009`", page)
    (second,) = re.findall(r"run as `(torchrun .* tiny_update.py http://127.0.0.1:8009)`", page)
    port = free_ports(1)
    with started([sys.executable, str(tmp_path / first), str(port)]):
        printed = site.shell(second.replace("8009", str(port)))
    assert "v1: " in printed and "[1.5, 2.25]" in printed


RUN["docs/integrators.md: import sys"] = test_an_engine_of_ones_own


@runs("docs/integrators.md: torchrun")
def test_the_examples_command() -> None:
    """tests/test_examples_rl.py runs it, in short."""
    (line,) = commands("docs/integrators.md: torchrun")
    script, flag, steps = line.split()[-3:]
    assert (ROOT / script).is_file() and flag == "--steps" and steps.isdigit()


@runs("docs/metrics.md: - alert")
def test_prometheus_takes_the_configuration_and_the_alerts(tmp_path: Path) -> None:
    promtool = tool("promtool")
    rules, scrape = block("docs/metrics.md: - alert").text, block("docs/metrics.md: scrape_configs").text
    indented = "".join(f"      {line}\n" for line in rules.splitlines())
    (tmp_path / "rules.yml").write_text(f"groups:\n  - name: weights\n    rules:\n{indented}")
    (tmp_path / "prometheus.yml").write_text(f"{scrape}rule_files: [rules.yml]\n")
    done = subprocess.run(
        [promtool, "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0 and "SUCCESS: 3 rules found" in done.stdout + done.stderr, done.stdout + done.stderr


RUN["docs/metrics.md: scrape_configs"] = test_prometheus_takes_the_configuration_and_the_alerts
