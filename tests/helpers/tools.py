"""Tools that some tests need and that are no part of the package: `make tools` installs them in an environment of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VENV = Path(os.environ.get("TOOLS_VENV") or Path(__file__).parents[2] / ".venv-tools")


def tool(name: str) -> str:
    """A program of that environment ("python", "schemathesis", ...); skips the test where it is not."""
    path = VENV / "bin" / name
    if not path.exists():
        pytest.skip(f"no {path}: `make tools` installs it")
    return str(path)
