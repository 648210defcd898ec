"""Commands as their users run them: a process group, what it prints, and its end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
SRC = Path(__file__).parents[2] / "src"


@contextlib.contextmanager
def started(command: list[str], **variables: str) -> Iterator[list[str]]:
    """Yields the command's output so far, line by line, and ends it by SIGTERM.

    Raises AssertionError with where each of its processes stood when that takes longer than 40 s.
    """
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **variables}
    lines: list[str] = []
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=lambda pipe: lines.extend(pipe), args=(process.stdout,))
        reader.start()
        try:
            yield lines
        finally:
            process.terminate()  # torchrun passes it on
            ended = _ends(process)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            reader.join(20)
        if not ended:
            raise AssertionError("SIGTERM did not end it in 40 s:\n" + "".join(lines))


def _ends(process: subprocess.Popen[str]) -> bool:
    """Whether it does by itself; if not, its processes say where they stand."""
    try:
        process.wait(40)
    except subprocess.TimeoutExpired:
        for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGABRT)  # faulthandler prints the stacks of all threads
        psutil.wait_procs([psutil.Process(process.pid)], 10)
        return False
    return True


def until_said(lines: list[str], pattern: str, seconds: float = 60.0) -> re.Match[str]:
    """The first match of a regular expression in what a process prints."""
    waited, pause = 0.0, threading.Event()
    while waited < seconds:
        if found := re.search(pattern, "".join(lines)):
            return found
        pause.wait(0.1)
        waited += 0.1
    raise AssertionError(f"not said in {seconds:g} s: {pattern}\n" + "".join(lines))


def url_of(lines: list[str]) -> str:
    """Where what prints these listens."""
    return until_said(lines, r"listening on (\S+)")[1].replace("0.0.0.0", "127.0.0.1")
