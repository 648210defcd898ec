"""Embedded engines as processes. Importing transformers takes seconds, so one process does it and forks into all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from helpers.netns import Host

TESTS = Path(__file__).parents[1]


@contextmanager
def engine_processes(model: Path, arguments: Sequence[Sequence[str]], hosts: Sequence[Host] = ()) -> Iterator[list[str]]:
    """One `checkpoint-engine engine` with random weights for each entry of `arguments`; yields their URLs once all listen.

    hosts: where each runs, in the same order; none: here.
    """
    common = ["engine", str(model), "--load-format", "dummy", "--threads", "1", "--until-stdin-ends"]
    places = [[h.namespace, h.name, h.address, h.hosts_file] for h in hosts] or [None] * len(arguments)
    with ExitStack() as stack:
        pipes = [os.pipe() for _ in arguments]
        outputs = [stack.enter_context(open(read)) for read, _ in pipes]
        work = [([*common, *own], place, pipe[1]) for own, place, pipe in zip(arguments, places, pipes, strict=True)]
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # others would not survive the fork
        process = subprocess.Popen(
            [sys.executable, "-m", "helpers.engines", json.dumps(work)],
            stdin=subprocess.PIPE,
            pass_fds=[write for _, write in pipes],
            start_new_session=True,
            env={**os.environ, **one_thread, "PYTHONPATH": path},
        )
        stack.callback(_end, process)
        for _, write in pipes:
            os.close(write)
        yield [_url(output.readline()) for output in outputs]


def _url(line: str) -> str:
    if not line.startswith("listening on "):
        raise RuntimeError(f"the engine said {line!r} instead of where it listens; its last words are on stderr")
    return line.removeprefix("listening on ").strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    with process:  # closes the pipe, waits
        pass


def _main(work: list[tuple[list[str], list[str] | None, int]]) -> None:
    from checkpoint_engine.cli import run
    from checkpoint_engine.engines.embedded import app, model, serve  # noqa: F401

    children = []
    for argv, place, output in work:
        if child := os.fork():
            children.append(child)
            continue
        if place is not None:
            Host(*place).enter()
        os.dup2(output, sys.stdout.fileno())
        for _, _, descriptor in work:
            os.close(descriptor)
        sys.exit(run(argv))
    for _, _, output in work:
        os.close(output)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
