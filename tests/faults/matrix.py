"""Runs the fault matrix and prints it as a table.

    PYTHONPATH=src:tests python -m faults.matrix [--who WORD] [--stage WORD] [--kind WORD] [--method copies] [--markdown]

A world of three servers, an engine beside each; the second rank is struck, or the first, where the store is. Peer sources: a
world of two, from which a third server's engine gets everything. A fleet is used for one cell after the other: stopped processes
are let go on, killed ones are replaced, and if that was a server, all meet in a new world (`ParameterServer.regroup`).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.actors import STAGES, Strike, Told, expected, front, serve, work
from faults.cells import KINDS, LOADS, WHO, Cell, cells, senseless
from helpers.ports import free_ports
from helpers.ranks import PRELOAD, _context

_context.set_forkserver_preload([*PRELOAD, "faults.actors"])
RANKS = 3
LIMIT = 30.0
"""Seconds within which every command must have ended, whatever was struck: more is a hang."""
NEVER = "nothing was struck"
QUICK, PATIENT = 2.0, 20.0
"""Deadline of an update: where something is stopped, so that it decides, and elsewhere."""
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "bucket_bytes": 64 << 10,
    "ring_bytes": 128 << 10,  # so that most is not lifted yet when the first bucket is loaded
    "connect_timeout": 2.0,
    "attach_timeout": 3.0,
    "join_timeout": 3.0,
    "commit_timeout": 2.0,
    "stop_timeout": 0.5,
    "peer_transport": "tcp",
}
METHODS = {
    "copies": {"map_regions": False},
    "broadcast": {"map_regions": False, "peer_copies": False},
    "mapped": {},
}


@functools.cache
def whole(name: str, layers: int) -> dict[str, str]:
    return expected(name, layers)


class Hung(AssertionError):
    """A process did not answer within LIMIT."""


class Actor:
    """A process and the pipe by which it is told what to do."""

    def __init__(self, name: str, run: Callable[..., None], *arguments: Any) -> None:
        self.name = name
        self.pipe, theirs = _context.Pipe()
        self.process = _context.Process(target=run, args=(theirs, *arguments))
        self.process.start()
        theirs.close()
        self.owed = False  # an answer
        self.baseline: Counter[str] | None = None

    @property
    def pid(self) -> int:
        if self.process.pid is None:
            raise RuntimeError(f"{self.name} has not started")
        return self.process.pid

    def tell(self, *words: Any) -> None:
        self.pipe.send(words)
        self.owed = True

    def hear(self, seconds: float = LIMIT) -> Any:
        """Its answer. Raises EOFError when it is dead, Hung when it does not come."""
        if not self.pipe.poll(seconds):
            raise Hung(f"{self.name} has not answered within {seconds:g} s")
        self.owed = False
        return self.pipe.recv()

    @property
    def dead(self) -> bool:
        return not self.process.is_alive()

    def kept(self) -> Counter[str]:
        """What it has open: memfds, sockets, threads."""
        found: Counter[str] = Counter()
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                target = os.readlink(entry)
                if target.startswith(("/memfd:", "socket:")):
                    found["memfd" if target[1] == "m" else "socket"] += 1
        found["thread"] = len(list(Path(f"/proc/{self.pid}/task").iterdir()))
        return found

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


class Engine:
    """A worker and its HTTP server."""

    def __init__(self, number: int, variables: dict[str, str], layers: int) -> None:
        ours, theirs = _context.Pipe()
        self.worker = Actor(f"worker {number}", work, ours, variables, number, layers)
        self.http = Actor(f"HTTP server {number}", front, theirs, variables)
        ours.close()
        theirs.close()
        self.url: str = self.http.hear()

    def state(self) -> tuple[str | None, bool, dict[str, str]]:
        self.worker.pipe.send("state")
        state: tuple[str | None, bool, dict[str, str]] = self.worker.hear()
        return state

    def order(self, actor: Actor, order: Any) -> None:
        actor.pipe.send(order)
        actor.hear()

    @property
    def broken(self) -> bool:
        return self.worker.dead or self.http.dead

    def end(self) -> None:
        self.http.end()
        self.worker.end()


class Fleet:
    """`size` servers of one world, and an engine beside each of them, or beside none. A context manager."""

    def __init__(self, folder: Path, size: int, *, engines: bool, settings: dict[str, Any], layers: int = 16) -> None:
        self.size, self.layers, self._settings = size, layers, settings
        self.variables = {"CHECKPOINT_ENGINE_SOCKET_DIR": str(folder), "CHECKPOINT_ENGINE_DEVICE": settings["device"]}
        self.engines = [Engine(rank, self.variables, layers) for rank in range(size)] if engines else []
        self.servers = [self._server(rank) for rank in range(size)]
        self.meet()

    def _server(self, rank: int) -> Actor:
        return Actor(f"server {rank}", serve, self.variables, self._settings, self.layers)

    def meet(self) -> None:
        """All servers in a new world."""
        port = free_ports()
        self.must("join", *[(rank, self.size, port) for rank in range(self.size)])

    def all(self, command: str, *arguments: tuple[Any, ...], but: Sequence[int] = ()) -> dict[int, Told]:
        """Have all but some do it, and hear how it went; of a rank that died meanwhile nothing is heard, nor of a stopped one."""
        ranks = [rank for rank in range(self.size) if rank not in but]
        for rank in ranks:
            self.servers[rank].tell(command, *(arguments[rank] if arguments else ()))
        return self.hear(ranks)

    def hear(self, ranks: Sequence[int]) -> dict[int, Told]:
        told = {}
        for rank in ranks:
            with contextlib.suppress(EOFError, ConnectionResetError):
                told[rank] = self.servers[rank].hear()
        return told

    def must(self, command: str, *arguments: tuple[Any, ...]) -> dict[int, Told]:
        told = self.all(command, *arguments)
        for rank in range(self.size):
            if rank not in told or told[rank].error:
                raise AssertionError(f"{command} on rank {rank}: {told.get(rank)}")
        return told

    def hold(self, *names: str) -> None:
        for name in names:
            self.must("hold", *[(name, rank, self.size) for rank in range(self.size)])

    def update(self, name: str, version: str, seconds: float = PATIENT) -> None:
        self.must("update", *[(name, version, engine.url, seconds) for engine in self.engines])

    @property
    def actors(self) -> list[Actor]:
        return [*self.servers, *(a for engine in self.engines for a in (engine.worker, engine.http))]

    def replace_dead(self) -> bool:
        """Whether a server was among them."""
        for rank, engine in enumerate(self.engines):
            if engine.broken:
                engine.end()
                self.engines[rank] = Engine(rank, self.variables, self.layers)
        found = False
        for rank, server in enumerate(self.servers):
            if server.dead:
                server.end()
                self.servers[rank], found = self._server(rank), True
        return found

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.servers:
            actor.end()
        for engine in self.engines:
            engine.end()


@dataclass
class Outcome:
    """seconds: until the last of the ranks that were not struck knew; None: there was nothing to know. workers: what they serve
    after it. healed: how. aside: what a server that stood still, or a communicator that is given up, may write to was set aside.
    problems: what must not be."""

    cell: Cell
    result: str = ""
    seconds: float | None = None
    workers: str = ""
    healed: str = ""
    aside: bool = False
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        seconds = "" if self.seconds is None else f"{self.seconds:6.2f} s"
        bad = f"   PROBLEMS: {'; '.join(self.problems)}" if self.problems else ""
        aside = ", a ring set aside" if self.aside else ""
        return f"{self.cell!s:44}{self.result:30}{seconds:10}{self.workers:16}{self.healed}{aside}{bad}"


class Runner:
    """Runs cells, one after the other."""

    def __init__(self, folder: Path, method: str) -> None:
        self._folder, self._settings = folder, {**SETTINGS, **METHODS[method]}
        self._abandons = method == "broadcast"  # a communicator that a server left; gloo has no way to end it
        self._sockets = folder / "s"
        self._stack = contextlib.ExitStack()
        self._fleet: Fleet | None = None
        self._sources: Fleet | None = None
        self._count = 0
        self.outcomes: list[Outcome] = []

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    def _drop(self) -> None:
        self._stack.close()
        self._fleet = self._sources = None

    def run(self, cell: Cell) -> Outcome:
        outcome = self._attempt(cell)
        if NEVER in outcome.problems:  # the machine was too slow to get there before the deadline, which tells nothing
            self._drop()
            outcome = self._attempt(cell)
        self.outcomes.append(outcome)
        return outcome

    def _attempt(self, cell: Cell) -> Outcome:
        self._count += 1
        outcome = Outcome(cell)
        mark = self._folder / f"mark-{self._count}"
        try:
            if cell.who == "peer source":
                self._run_peer(cell, outcome, str(mark))
            else:
                self._run_member(cell, outcome, str(mark))
        except (Hung, AssertionError, EOFError, OSError) as e:
            outcome.problems.append(f"{type(e).__name__}: {e}")
            self._drop()  # the next cell begins anew
        return outcome

    # --- members of a world ----------------------------------------------------------------------------------------------

    def _members(self) -> Fleet:
        if self._fleet is None:
            self._drop()
            self._fleet = self._stack.enter_context(Fleet(self._sockets, RANKS, engines=True, settings=self._settings))
            self._fleet.hold("old", "new")
            self._fleet.update("old", "old-0")
            for name in ("old", "new"):  # so that everything that is kept is there
                self._fleet.update(name, "old-0")
            self._fleet.update("old", "old-0")
            for actor in self._fleet.actors:
                actor.baseline = actor.kept()
        return self._fleet

    def _run_member(self, cell: Cell, outcome: Outcome, mark: str) -> None:
        fleet = self._members()
        rank = 0 if cell.who == "store host" else 1
        stops = cell.kind == "SIGSTOP"
        seconds = QUICK if stops else PATIENT
        engine, server = fleet.engines[rank], fleet.servers[rank]
        victim = {"worker": engine.worker, "engine's HTTP": engine.http}.get(cell.who, server)
        is_server = victim is server
        before = [e.state() for e in fleet.engines]
        own: Strike | None = None  # that the victim's server has the orders for
        if cell.stage == "between updates":
            self._strike_between(cell, fleet, rank, victim, mark)
        elif is_server and (cell.stage in ("register", "gather", "attach") or cell.kind == "exception"):
            own = Strike(cell.stage, cell.kind, mark)
        elif victim is engine.http and cell.stage == "attach":
            engine.order(engine.http, Strike(cell.stage, cell.kind, mark))
        else:
            engine.order(
                engine.worker, ("strike", Strike(cell.stage, cell.kind, mark, 0 if victim is engine.worker else victim.pid))
            )

        struck = [rank] if is_server and cell.kind in ("SIGKILL", "SIGSTOP") else []
        told = self._do(fleet, cell, rank, own, seconds, struck)
        version = f"new-{self._count}"
        self._judge(cell, outcome, rank, told, mark)
        if cell.kind == "SIGKILL":
            victim.process.join(LIMIT)
        if stops:
            os.kill(victim.pid, signal.SIGCONT)
        if is_server and stops:
            if server.owed:
                fleet.hear([rank])  # its own call ends, too
            if cell.stage == "register":  # it comes late to what the others did meanwhile, and is told so
                server.tell("gather", "fresh")
                fleet.hear([rank])
            elif cell.stage == "between updates":
                server.tell("update", "new", version, engine.url, seconds)
                fleet.hear([rank])
        live = [(e, b) for e, b in zip(fleet.engines, before, strict=True) if not e.worker.dead]
        self._look_at_workers(outcome, live, version, None if victim is engine.http else engine)
        self._heal(cell, outcome, fleet)

    def _strike_between(self, cell: Cell, fleet: Fleet, rank: int, victim: Actor, mark: str) -> None:
        strike = Strike(cell.stage, cell.kind, mark, victim.pid)
        if cell.kind in ("SIGKILL", "SIGSTOP"):
            strike()
            if cell.kind == "SIGKILL":
                victim.process.join()
        elif victim is fleet.engines[rank].worker:
            strike.note()
            fleet.engines[rank].order(victim, ("serve", "a version of its own"))
        else:
            strike.note()
            if cell.kind == "exception":
                victim.tell("close")
                victim.hear()

    def _do(
        self, fleet: Fleet, cell: Cell, rank: int, own: Strike | None, seconds: float, struck: Sequence[int]
    ) -> dict[int, Told]:
        """Have all ranks do what is struck; how it went on those that were not, and on those that were and can tell."""
        name, version = "new", f"new-{self._count}"
        gone = [r for r in range(RANKS) if fleet.servers[r].dead or (cell.stage == "between updates" and r in struck)]
        if cell.stage == "between updates" and own is None and cell.who in ("server", "store host"):
            gone = sorted({*gone, rank})
        live = [r for r in range(RANKS) if r not in gone]
        if cell.stage in ("register", "gather"):
            name = "fresh"
            for r in live:
                mine = own if r == rank and cell.stage == "register" else None
                fleet.servers[r].tell("register", name, r, RANKS, mine)
            told = fleet.hear([r for r in live if r not in struck or cell.stage == "gather"])
            if any(t.error for t in told.values()):
                return {r: t for r, t in told.items() if t.error}
            live = [r for r in live if cell.stage == "gather" or r not in struck]
            for r in live:
                fleet.servers[r].tell(
                    "gather", name, *([own] if r == rank and own is not None and cell.stage == "gather" else [])
                )
        else:
            for r in live:
                mine = own if r == rank else None
                fleet.servers[r].tell("update", name, version, fleet.engines[r].url, seconds, mine)
            if rank in gone and cell.kind == "wrong answer":
                fleet.servers[rank].tell("barrier")
        told = fleet.hear([r for r in live if r not in struck])
        if rank in gone and cell.kind == "wrong answer":
            fleet.hear([rank])
        return told

    def _judge(self, cell: Cell, outcome: Outcome, rank: int, told: dict[int, Told], mark: str) -> None:
        errors = {r: t for r, t in told.items() if t.error}
        if not Path(mark).exists():
            outcome.problems.append(NEVER)
            return
        if not errors:
            outcome.result = "succeeds"
        else:
            # What all say but for the victim itself, which may have an error of its own; else what that says.
            seen = {r: t for r, t in errors.items() if r != rank} or errors
            outcome.result = _short(next(iter(seen.values())))
            outcome.seconds = max(t.at for t in seen.values()) - float(Path(mark).read_text())
            local = cell.stage == "register" and seen is errors
            unknown = self._abandons and cell.kind == "SIGSTOP"  # gloo does not say whom it waits for
            for r, t in seen.items():
                if t.error.startswith("(") and not local:
                    outcome.problems.append(f"rank {r} got {t.error}: {t.text}")
                if not (local or unknown) and f"rank {rank}" not in t.text and f"ranks [{rank}]" not in t.text:
                    outcome.problems.append(f"rank {r} was not told that it was rank {rank}: {t.text}")
        if bool(errors) == cell.succeeds:
            outcome.problems.append(f"expected {'success' if cell.succeeds else 'an error'}: {told}")

    def _look_at_workers(self, outcome: Outcome, engines: list[tuple[Engine, Any]], version: str, struck: Engine | None) -> None:
        """struck: whose worker, or its server, was; the others must agree."""
        serves, others = Counter[str](), set[str]()
        for engine, before in engines:
            now, dirty, held = engine.state()
            new = now == version
            what = "dirty" if dirty else "new" if new else "old"
            serves[what] += 1
            if engine is not struck:
                others.add(what)
            if dirty:
                continue
            if new and held != whole("new", len(held) // 8):
                outcome.problems.append(f"{engine.worker.name} serves {now!r}, and it is a mixture")
            if not new and held != before[2]:
                outcome.problems.append(f"{engine.worker.name} says that it serves {now!r} as before, and it does not")
        if "new" in others and len(others) > 1:  # some may have loaded nothing yet when others had
            outcome.problems.append(f"workers that were not struck differ: {dict(serves)}")
        outcome.workers = ", ".join(f"{count} {what}" for what, count in sorted(serves.items()))

    def _heal(self, cell: Cell, outcome: Outcome, fleet: Fleet) -> None:
        outcome.healed = "next update"
        lost = fleet.replace_dead()
        closed = cell.who in ("server", "store host") and cell.kind == "exception" and cell.stage in ("gather", "between updates")
        if lost or closed:
            outcome.healed = "new world"
            fleet.meet()
            fleet.hold("old", "new")
        elif cell.who in ("server", "store host") and cell.kind == "wrong answer" and cell.stage in LOADS:
            fleet.hold("new")
        version = f"old-{self._count}"
        try:
            fleet.update("old", version)
        except AssertionError:  # who went on late ended a call that the others had given up, and is one call ahead of them
            if cell.kind != "SIGSTOP":
                raise
            outcome.healed = "second update"
            fleet.update("old", version)
        for engine in fleet.engines:
            if engine.state() != (version, False, whole("old", fleet.layers)):
                outcome.problems.append(f"{engine.worker.name} was not healed")
        for server in fleet.servers:
            server.tell("forget", "fresh")
            server.hear()
        self._look_for_leftovers(outcome, fleet)

    def _look_for_leftovers(self, outcome: Outcome, fleet: Fleet) -> None:
        of_server = outcome.cell.who in ("server", "store host")
        aside = {"memfd"} if of_server and outcome.cell.kind == "SIGSTOP" else set()  # who stands still may write into them
        if self._abandons and outcome.cell.kind in ("SIGKILL", "SIGSTOP"):  # it may be given up
            aside = {"memfd", "socket", "thread"}
        if self._sockets.is_dir() and (left := [path.name for path in self._sockets.iterdir()]):
            outcome.problems.append(f"sockets left: {left}")
        for actor in fleet.actors:
            if actor.baseline is None:
                actor.baseline = actor.kept()
            deadline = time.monotonic() + 5.0
            while (more := actor.kept() - actor.baseline) and time.monotonic() < deadline:
                time.sleep(0.05)  # what is ending already
                if actor in fleet.servers:  # an error that somebody kept may have left a cycle
                    actor.tell("collect")
                    actor.hear()
            if not more:
                continue
            actor.baseline = actor.kept()
            if more.keys() <= aside:
                outcome.aside = True
            else:
                outcome.problems.append(f"{actor.name} keeps {dict(more)} more")

    # --- peers -----------------------------------------------------------------------------------------------------------

    def _peers(self) -> tuple[Fleet, Fleet]:
        """(sources, joiner)"""
        if self._fleet is None or self._sources is None:
            self._drop()
            self._sources = self._stack.enter_context(Fleet(self._sockets, 2, engines=False, settings=self._settings, layers=30))
            self._fleet = self._stack.enter_context(Fleet(self._sockets, 1, engines=True, settings=self._settings, layers=30))
            self._share()
            self._fleet.update("new", "old-0")
            self._fleet.update("new", "old-0")
            for actor in (*self._fleet.actors, *self._sources.actors):
                actor.baseline = actor.kept()
        return self._sources, self._fleet

    def _share(self) -> None:
        if self._sources is None or self._fleet is None:
            raise RuntimeError("no fleet")
        self._sources.hold("new")
        metas = self._sources.must("give_metas")[0].value
        self._fleet.must("load", (metas,))

    def _run_peer(self, cell: Cell, outcome: Outcome, mark: str) -> None:
        sources, joiner = self._peers()
        source, engine = sources.servers[1], joiner.engines[0]
        before = engine.state()
        strike = Strike(cell.stage, cell.kind, mark, source.pid)
        if cell.stage in ("attach", "between updates"):  # the joiner connects to it next
            strike()
        else:
            engine.order(engine.worker, ("strike", strike))
        version = f"new-{self._count}"
        seconds = 2 * QUICK if cell.kind == "SIGSTOP" else PATIENT  # longer than a source is waited for
        told = joiner.all("update", ("new", version, engine.url, seconds))
        errors = {1 - rank: t for rank, t in told.items()}  # so that the struck source is "rank 1", and the joiner is not
        self._judge(cell, outcome, 1, errors, mark)
        if cell.kind == "SIGSTOP":
            os.kill(source.pid, signal.SIGCONT)
        self._look_at_workers(outcome, [(engine, before)], version, None)
        if cell.kind == "SIGKILL":
            source.process.join(LIMIT)
        lost = sources.replace_dead()
        outcome.healed = "next update"
        if lost or cell.kind == "exception":
            outcome.healed = "new sources"
            sources.meet()
        if lost or cell.kind in ("exception", "wrong answer"):
            self._share()
        joiner.update("new", f"old-{self._count}")
        if engine.state() != (f"old-{self._count}", False, whole("new", joiner.layers)):
            outcome.problems.append("the joiner was not healed")
        self._look_for_leftovers(outcome, joiner)
        self._look_for_leftovers(outcome, sources)


def _short(told: Told) -> str:
    stage = told.text.partition(", stage ")[2].partition(":")[0] if told.error == "UpdateError" else ""
    return f"{told.error}, {stage}" if stage else told.error


@contextlib.contextmanager
def runner(method: str = "copies") -> Iterator[Runner]:
    with tempfile.TemporaryDirectory(prefix="fm-", dir="/tmp") as folder, Runner(Path(folder), method) as it:
        yield it


# --- telling -----------------------------------------------------------------------------------------------------------------


def markdown(outcomes: Sequence[Outcome]) -> str:
    """One row for who and stage, one column for what happens."""
    by_cell = {(o.cell.who, o.cell.stage, o.cell.kind): o for o in outcomes}
    lines = [f"| who | stage | {' | '.join(KINDS)} |", "|---" * (2 + len(KINDS)) + "|"]
    for who in WHO:
        for stage in STAGES:
            row = []
            for kind in KINDS:
                outcome = by_cell.get((who, stage, kind))
                if outcome is None:
                    row.append(f"({senseless(who, stage, kind)})" if senseless(who, stage, kind) else "not run")
                    continue
                seconds = "" if outcome.seconds is None else f", {outcome.seconds:.2f} s"
                row.append(
                    f"{outcome.result}{seconds}; {outcome.workers}; {outcome.healed}{' **!**' if outcome.problems else ''}"
                )
            lines.append(f"| {who} | {stage} | {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, known in (("who", WHO), ("stage", STAGES), ("kind", KINDS)):
        parser.add_argument(f"--{name}", help=f"only these: a part of {', '.join(known)}", default="")
    parser.add_argument("--method", choices=METHODS, default="copies")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    chosen = [c for c in cells() if arguments.who in c.who and arguments.stage in c.stage and arguments.kind in c.kind]
    start = time.monotonic()
    with runner(arguments.method) as it:
        for cell in chosen:
            print(it.run(cell), file=sys.stderr if arguments.markdown else sys.stdout, flush=True)
    outcomes = it.outcomes
    if arguments.markdown:
        print(markdown(outcomes))
    bad = sum(bool(o.problems) for o in outcomes)
    print(f"{len(outcomes)} cells in {time.monotonic() - start:.0f} s, {bad} with problems", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
