"""SGLang's own checkpoint-engine modules, as published: taken from its wheel, kept outside the tree, unchanged.

SGLang itself needs CUDA libraries to be installed; three of its files are enough to speak for it here.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FILES = ("__init__.py", "checkpoint_engine_worker.py", "update.py")
FOLDER = "sglang/srt/checkpoint_engine"
LOGURU = "loguru==0.7.3"  # SGLang's script imports it beside ParameterServer; neither package depends on it
SECONDS = 240.0


class Unavailable(Exception):
    """The package index cannot be reached, or has no wheel for this interpreter."""


def sglang_wheel(version: str) -> Path:
    """A folder for `sys.path` with SGLang's checkpoint-engine modules of `version`, and loguru; made once.

    Raises Unavailable with pip's last words.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ckpt-engine"
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"sglang-{version}-py{sys.version_info.major}{sys.version_info.minor}"
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as work:
                made = Path(work) / "made"
                _make(version, Path(work), made)
                made.rename(path)
    return path


def _make(version: str, work: Path, made: Path) -> None:
    only = ["--no-deps", "--only-binary=:all:"]
    _pip("download", *only, "--dest", str(work), f"sglang=={version}")
    _pip("install", *only, "--target", str(made), LOGURU)
    (wheel,) = work.glob("sglang-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            target = made / FOLDER / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(f"{FOLDER}/{name}") as source, target.open("wb") as output:
                shutil.copyfileobj(source, output)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--timeout", "10", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip {arguments[0]} took more than {SECONDS:g} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["it said nothing"]
        raise Unavailable(f"pip {arguments[0]} failed: {said[-1]}")
