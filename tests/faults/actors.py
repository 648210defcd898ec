"""The processes of the fault matrix: servers, engines (a worker and its HTTP server), each of which obeys the driver's pipe.

A fault strikes at a stage of the update that a worker sees, so workers strike: themselves, or another process by a signal.
SIGUSR1 makes an HTTP server answer 500 at once and a source close; SIGUSR2 makes an HTTP server answer that all went well, and a
server change the bytes that it has registered.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import signal
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from checkpoint_engine.engines.sglang import SGLang
from checkpoint_engine.errors import CheckpointEngineError, UpdateError
from checkpoint_engine.server import ParameterServer
from checkpoint_engine.server.sources import Metas
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport import messages as m
from checkpoint_engine.transport.session import connect
from checkpoint_engine.worker import WeightsState, update_weights_from_ipc
from helpers.fleet import Handles, digests, share_of, tensors

STAGES = ("register", "gather", "attach", "load first", "load middle", "load last", "release", "commit", "between updates")
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP, "exception": signal.SIGUSR1, "wrong answer": signal.SIGUSR2}
MIDDLE = 2


@dataclass(frozen=True)
class Strike:
    """What happens at `stage` of the next update. pid: to which process; 0: to the one that has the orders. mark: a file that
    gets the time at which it happened."""

    stage: str
    kind: str
    mark: str
    pid: int = 0

    def __call__(self) -> None:
        """Raises when this process is to raise."""
        self.note()
        if not self.pid and self.kind == "exception":
            raise ValueError(f"struck in {self.stage}")
        os.kill(self.pid or os.getpid(), SIGNALS[self.kind])
        if self.pid:
            time.sleep(0.05)  # it is struck when all its threads are, or when its main thread runs the handler

    def note(self) -> None:
        Path(self.mark).write_text(str(time.monotonic()))


def named(name: str, layers: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of that name, the same everywhere."""
    return tensors(sum(name.encode()), layers)


def expected(name: str, layers: int) -> dict[str, str]:
    return digests(named(name, layers))


# --- worker ---------------------------------------------------------------------------------------------------------------


class _State(WeightsState):
    before: Any = None

    def commit(self, version: str) -> None:
        if self.before is not None:
            self.before("commit")
        super().commit(version)


class _Worker:
    def __init__(self, device: int, layers: int) -> None:
        self.device = device
        self.tensors: dict[str, torch.Tensor] = {}
        self.state = _State()
        self.state.before = self.reached
        self.strike: Strike | None = None
        self.count, self.calls, self.seen = len(named("", layers)), 0, 0

    def reached(self, stage: str) -> None:
        if self.strike is not None and self.strike.stage == stage:
            strike, self.strike = self.strike, None
            strike()

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.seen += len(weights)
        at = {0: "load first", MIDDLE: "load middle"}.get(self.calls, "load last" if self.seen == self.count else "")
        self.calls += 1
        self.reached(at)
        self.tensors.update((name, tensor.clone()) for name, tensor in weights)

    def update(self, handle: str) -> str:
        self.calls = self.seen = 0
        if self.strike is not None and not self.strike.pid and self.strike.kind == "wrong answer":
            strike, self.strike = self.strike, None
            return lie(handle, strike)
        self.reached("attach")
        hook = lambda: self.reached("release")  # noqa: E731
        return update_weights_from_ipc(None, handle, self.device, run=self.load, post_hook=hook, state=self.state)


def lie(handle: str, strike: Strike) -> str:
    """A worker that loads nothing and says the right thing until `strike.stage`, and something else then."""

    def answer(stage: str, right: Any, wrong: Any) -> None:
        if strike.stage == stage:
            strike.note()
        channel.send(wrong if strike.stage == stage else right, seconds=10)

    with connect(handle, 10) as channel:
        hello = m.Hello(os.getpid(), "CPU", None, False, ())
        answer("attach", hello, m.Committed())
        last = -1
        while True:
            match channel.receive(seconds=10):
                case m.Attach(tables=tables):
                    for descriptor in channel.take_descriptors():
                        os.close(descriptor)
                    last = len(tables or ()) - 1
                case m.Load(bucket=bucket):
                    at = {0: "load first", MIDDLE: "load middle", last: "load last"}.get(bucket, "")
                    answer(at or "load", m.Loaded(bucket, 0.0, 0.0), m.Loaded(bucket + 7, 0.0, 0.0))
                case m.Release():
                    answer("release", m.Ready(0.0), m.Loaded(0, 0.0, 0.0))
                case m.Commit(version=version):
                    answer("commit", m.Committed(), m.Ready(0.0))
                    return version
                case m.Abort(reason=reason):
                    raise RuntimeError(reason)


def work(pipe: Connection, requests: Connection, variables: dict[str, str], device: int, layers: int) -> None:
    """pipe: the driver's. requests: of the HTTP server."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    worker = _Worker(device, layers)
    while True:
        for ready in wait([pipe, requests]):
            try:
                asked = ready.recv()  # type: ignore[union-attr]
            except (EOFError, ConnectionResetError):
                if ready is pipe:
                    return
                time.sleep(0.01)  # the HTTP server is gone; the driver ends this process
                continue
            if ready is pipe:
                match asked:
                    case ("strike", strike):
                        worker.strike = strike
                        pipe.send(None)
                    case ("serve", version):  # something that no server told it
                        worker.state.before = None
                        worker.state.commit(version)
                        worker.state.before = worker.reached
                        pipe.send(None)
                    case "state":
                        held = {name: digests({name: t})[name] for name, t in worker.tensors.items()}
                        pipe.send((*worker.state.read(), held))
            else:
                number, handle = asked
                try:
                    worker.update(handle)
                    requests.send((number, ""))
                except Exception as e:
                    with contextlib.suppress(OSError):
                        requests.send((number, f"{type(e).__name__}: {e}"))


# --- the engine's HTTP server ---------------------------------------------------------------------------------------------


def front(pipe: Connection, worker: Connection, variables: dict[str, str]) -> None:
    """Asks the worker for each update that it is asked for, and answers when that has ended."""
    os.environ.update(variables)
    early: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
    signal.signal(signal.SIGUSR1, lambda *_: early.put((500, {"message": "struck"})))
    signal.signal(signal.SIGUSR2, lambda *_: early.put((200, {"success": True})))
    asking, orders, count = threading.Lock(), list[Strike](), [0]

    def ask(handle: str) -> tuple[int, dict[str, Any]]:
        if orders:
            strike = orders.pop()
            if strike.kind in ("exception", "wrong answer"):
                strike.note()
                return (500, {"message": "struck"}) if strike.kind == "exception" else (200, {"success": True})
            strike()
        with asking:
            while not early.empty():
                early.get()
            count[0] += 1
            worker.send((count[0], handle))
            while True:
                try:
                    number, error = worker.recv() if worker.poll(0.01) else (0, "")
                except EOFError:
                    return 500, {"message": "the worker is gone"}
                with contextlib.suppress(queue.Empty):  # it may have come while the worker ended
                    return early.get_nowait()
                if number == count[0]:
                    return (500, {"message": error}) if error else (200, {"success": True})

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, content = ask(next(iter(body["zmq_handles"].values())))
            data = json.dumps(content).encode()
            with contextlib.suppress(OSError):  # who asked has gone
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        pipe.send(f"http://127.0.0.1:{server.server_port}")
        with contextlib.suppress(EOFError):
            while True:
                orders.append(pipe.recv())
                pipe.send(None)


# --- server ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """How a command went on one server. at: when it ended, on time.monotonic."""

    at: float
    error: str = ""
    text: str = ""
    dirty: bool = False
    notes: tuple[str, ...] = ()
    value: Any = None


class _Server:
    """ps: None before it is part of a world."""

    def __init__(self, settings: Settings, layers: int) -> None:
        self.settings, self.layers = settings, layers
        self.ps: Any = None

    def join(self, rank: int, world_size: int, port: int) -> None:
        if self.ps is None:
            place = {"rank": rank, "world_size": world_size, "master_addr": "127.0.0.1", "master_port": port}
            self.ps = ParameterServer(settings=self.settings, **place)  # type: ignore[arg-type]
        else:
            self.ps.regroup(rank=rank, world_size=world_size, master_addr="127.0.0.1", master_port=port)

    def hold(self, name: str, rank: int, world_size: int) -> None:
        """register and gather, as if all ranks had it already."""
        if name in self.ps._registry:
            self.ps.unregister_checkpoint(name)
        self.register(name, rank, world_size)
        self.ps.gather_metas(name)

    def register(self, name: str, rank: int, world_size: int, strike: Strike | None = None) -> None:
        mine = share_of(named(name, self.layers), rank, world_size)
        if strike is None:
            self.ps.register_checkpoint(name, named_tensors=mine)
        elif strike.kind == "wrong answer":
            broken = Path(strike.mark).with_suffix(".safetensors")
            broken.write_bytes(b"\x40" + bytes(7) + b'{"w": {"dtype": "F32"')
            strike.note()
            self.ps.register_checkpoint(name, files=[broken], named_tensors=mine)
        else:
            self.ps.register_checkpoint(name, named_tensors=mine, progress=lambda done, total: strike())

    def gather(self, name: str, strike: Strike | None = None) -> None:
        if strike is not None:
            if strike.kind == "wrong answer":
                strike.note()
                name = "another"
            elif strike.kind == "exception":
                strike.note()
                self.close()  # as when an error leaves its `with`
                raise ValueError("struck in gather")
            else:
                strike()
        self.ps.gather_metas(name)

    def update(self, name: str, version: str, url: str, seconds: float, strike: Strike | None = None) -> Any:
        import datetime

        def ask(handles: Handles) -> None:
            mine = handles[self.ps.rank]
            if strike is not None and strike.stage == "attach":
                if strike.kind == "wrong answer":
                    strike.note()
                    mine = (mine[0], handles[(self.ps.rank + 1) % len(handles)][1])
                else:
                    strike()
            with SGLang(url) as engine:  # whose deadline is that of the update, as in a rollout
                engine.update([mine], version=version, seconds=seconds)

        buckets = [0]

        def progress(nbytes: int) -> None:
            self.done += nbytes
            at = {0: "load first", MIDDLE: "load middle"}.get(buckets[0], "load last" if self.done == self.total else "")
            buckets[0] += 1
            if strike is not None and strike.stage == at:
                strike()

        self.done, self.total = 0, sum(t.nbytes for t in named(name, self.layers).values())
        limit = datetime.timedelta(seconds=seconds)
        ranks = [0] if self.metas is not None else None
        report = self.ps.update(name, ask, version=version, timeout=limit, progress=progress, ranks=ranks)
        return report.notes

    metas: Metas | None = None

    def load(self, metas: bytes) -> None:
        self.metas = Metas.from_json(metas)
        self.ps.load_metas(self.metas)

    def collect(self) -> None:
        gc.collect()

    def barrier(self) -> None:
        self.ps.store_based_barrier()

    def give_metas(self) -> bytes:
        found: bytes = self.ps.get_metas().to_json()
        return found

    def forget(self, name: str) -> None:
        if name in self.ps._registry:
            self.ps.unregister_checkpoint(name)

    def close(self) -> None:
        if self.ps is not None:
            self.ps.close()
            self.ps = None

    def corrupt(self) -> None:
        """Every byte that it holds of "new" becomes another one."""
        for region in self.ps._registry["new"].regions:
            region.tensor.bitwise_xor_(0x55)


def serve(pipe: Connection, variables: dict[str, str], settings: dict[str, Any], layers: int) -> None:
    """pipe: the driver's, by which it has the server do one thing after the other."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    server = _Server(Settings.from_environment(**settings), layers)
    signal.signal(signal.SIGUSR1, lambda *_: server.close())
    signal.signal(signal.SIGUSR2, lambda *_: server.corrupt())
    while True:
        try:
            command, *arguments = pipe.recv()
        except EOFError:
            server.close()
            return
        try:
            told = Told(0.0, value=getattr(server, command)(*arguments))
        except Exception as e:
            dirty, notes = isinstance(e, UpdateError) and e.dirty, tuple(getattr(e, "__notes__", ()))
            kind = type(e).__name__ if isinstance(e, CheckpointEngineError) else f"({type(e).__name__})"
            told = Told(0.0, kind, str(e), dirty, notes)
        pipe.send(Told(time.monotonic(), told.error, told.text, told.dirty, told.notes, told.value))
