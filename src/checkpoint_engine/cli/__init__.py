"""The command line. Commands are imported when they are used, so that none pays for what another needs.

Exit codes: 0 done; 1 the update failed, or (status) weights are dirty; 2 usage or bad input (a setting, a file, a checkpoint);
3 an engine could not be reached, was not ready in time, or refused beforehand; 4 another rank, or the server that was asked,
could not be reached or is gone; 130 interrupted; 143 ended by SIGTERM.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from checkpoint_engine.errors import (
    AgreementError,
    CheckpointEngineError,
    CheckpointError,
    DeadlineError,
    EngineError,
    LoadPlanError,
    ManifestError,
    PeerLostError,
    ProtocolError,
    SettingsError,
    UpdateError,
)

EXIT_OK, EXIT_UPDATE, EXIT_INPUT, EXIT_ENGINE, EXIT_PEER, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130

# First match wins.
_EXIT_CODES: tuple[tuple[type[CheckpointEngineError], int], ...] = (
    (SettingsError, EXIT_INPUT),
    (CheckpointError, EXIT_INPUT),
    (LoadPlanError, EXIT_INPUT),
    (ManifestError, EXIT_INPUT),
    (EngineError, EXIT_ENGINE),
    (AgreementError, EXIT_PEER),
    (DeadlineError, EXIT_PEER),
    (PeerLostError, EXIT_PEER),
    (ProtocolError, EXIT_PEER),
    (CheckpointEngineError, EXIT_UPDATE),
)

# Command -> where its function is.
COMMANDS = {
    "demo": "checkpoint_engine.cli.demo:demo",
    "inspect": "checkpoint_engine.cli.inspect:inspect",
    "plan": "checkpoint_engine.cli.plan:plan",
    "update": "checkpoint_engine.cli.update:update",
    "join": "checkpoint_engine.cli.join:join",
    "engine": "checkpoint_engine.cli.engine:engine",
    "probe": "checkpoint_engine.cli.probe:probe",
    "serve": "checkpoint_engine.cli.serve:serve",
    "register": "checkpoint_engine.cli.register:register",
    "status": "checkpoint_engine.cli.status:status",
    "watch": "checkpoint_engine.cli.watch:watch",
    "trace": "checkpoint_engine.cli.trace:trace",
}


class Completion(NamedTuple):
    """What may stand in the place that is completed, as typer's shells take it."""

    value: str
    help: str | None = None
    type: str = "plain"


class LazyGroup(TyperGroup):
    """Finds a command's function, or its group of commands, in COMMANDS and makes the command of it."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name].partition(":")
        found = getattr(importlib.import_module(module), function)
        if isinstance(found, typer.Typer):
            found.info.name = cmd_name
            return get_group(found)
        single = typer.Typer(add_completion=False)
        single.command(cmd_name)(found)
        return get_command(single)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Without importing what the commands import, which takes seconds."""
        options = (option for param in self.get_params(ctx) for option in param.opts) if incomplete.startswith("-") else ()
        return [Completion(word) for word in (*COMMANDS, *options) if word.startswith(incomplete)]


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        from checkpoint_engine import __version__

        typer.echo(f"ckpt-engine {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Put new weights into inference engines that are already serving."""


def exit_code(error: CheckpointEngineError) -> int:
    """The exit code that stands for `error`; see the module's documentation."""
    own = getattr(error, "exit_code", None)  # of what happened elsewhere
    return own if isinstance(own, int) else exit_code_of(type(error))


def exit_code_of(kind: type[CheckpointEngineError]) -> int:
    return next(code for known, code in _EXIT_CODES if issubclass(kind, known))


def run(argv: Sequence[str]) -> int:
    """Run one command; returns its exit code. Errors of this package print one line that names the cause."""
    try:
        with _terminated_as_exit():
            app(list(argv), prog_name="checkpoint-engine")
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else EXIT_OK if e.code is None else EXIT_UPDATE
    except CheckpointEngineError as e:
        # All ranks raise the same UpdateError: one line is enough.
        if not (isinstance(e, UpdateError) and os.environ.get("RANK", "0") != "0"):
            typer.echo(f"checkpoint-engine: error{_rank()}: {_one_line(e)}", err=True)
        return exit_code(e)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_OK


def _rank() -> str:
    return f" on rank {os.environ['RANK']}" if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """SIGTERM, which torchrun sends when another rank has failed, ends the context managers that own sockets and memory."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
