"""The probe on a CPU; tests/test_devices_cuda.py runs it on GPUs."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from checkpoint_engine.cli.probe import probe as command
from checkpoint_engine.devices.probe import MIB, Ceilings, probe
from checkpoint_engine.errors import SettingsError


def test_two_ranks_on_a_cpu() -> None:
    found = probe("cpu", sizes=(MIB, 2 * MIB), region_bytes=4 * MIB, seconds=0.01, timeout=50)
    assert found.backend == "gloo" and found.names == ("cpu", "cpu")
    assert [entry.nbytes for entry in found.broadcast] == [MIB, 2 * MIB]
    assert found.memcpy > 0 and all(entry.rate > 0 for entry in found.broadcast)
    assert found.h2d_alone == () and found.device_copy == ()
    assert json.loads(found.to_json())["broadcast"][0]["nbytes"] == MIB


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_command(arguments: list[str]) -> None:
    app = typer.Typer()
    app.command()(command)
    size = ["--device", "cpu", "--ranks", "1", "--region", "1", "--seconds", "0", "--timeout", "50"]
    result = CliRunner().invoke(app, [*size, *arguments])
    assert result.exit_code == 0, result.output
    if arguments:
        assert json.loads(result.output)["memcpy"] > 0
    else:
        assert "memcpy" in result.output and "GB/s" in result.output


def test_what_cannot_be_probed() -> None:
    with pytest.raises(SettingsError, match="cannot be probed"):
        probe("tpu")
    with pytest.raises(SettingsError, match="visible devices"):
        probe("cuda", ranks=torch.cuda.device_count() + 1)
    assert Ceilings.__doc__ is not None and "bytes/second" in Ceilings.__doc__
