"""The command that runs the embedded engine."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checkpoint_engine.cli.report import announce

if TYPE_CHECKING:
    import torch

    from checkpoint_engine.loads.recordable import Recordable


class LoadFormat(StrEnum):
    auto = "auto"
    dummy = "dummy"


def engine(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory: configuration, tokenizer, weights.")],
    load_format: Annotated[LoadFormat, typer.Option(help="dummy: start with random weights.")] = LoadFormat.auto,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any.", min=0, max=65535)] = 0,
    uds: Annotated[Path | None, typer.Option(help="Listen on this Unix socket instead.")] = None,
    port_file: Annotated[Path | None, typer.Option(help="Write the URL to this file once requests are accepted.")] = None,
    follower: Annotated[list[str] | None, typer.Option(help="URL of a further worker of this replica; repeatable.")] = None,
    served_version: Annotated[str | None, typer.Option(help="Version of the weights at the start.")] = None,
    threads: Annotated[int, typer.Option(help="Threads that compute; 0: one per core.", min=0)] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Say where it listens as a line of JSON.")] = False,
    until_stdin_ends: Annotated[bool, typer.Option(help="End when stdin does, so with the process that holds it open.")] = False,
) -> None:
    """Serve a transformers model on the CPU: embeddings or generation, with weights that can be updated in place.

    Prints "listening on URL" once it accepts requests. Ends on SIGTERM or Ctrl-C.
    """
    # Imported here, so that the other commands do not pay for torch, transformers and the web framework.
    import torch
    from transformers.utils import logging as transformers_logging

    from checkpoint_engine.engines.embedded.app import create_app
    from checkpoint_engine.engines.embedded.model import ServedModel
    from checkpoint_engine.engines.embedded.serve import bind, serve
    from checkpoint_engine.engines.embedded.service import EmbeddedEngine

    if until_stdin_ends:
        threading.Thread(target=_end_with_stdin, name="stdin", daemon=True).start()
    if threads:
        torch.set_num_threads(threads)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    listener, url = bind(host, port, uds)
    try:
        served = ServedModel.load(model, load_format.value)
        if served_version is None and load_format is LoadFormat.auto:
            served_version = model.resolve().name
        app = create_app(EmbeddedEngine(served, worker(served_version), version=served_version, followers=follower or ()))
        serve(app, listener, partial(_announce, url, port_file, json_output))
    finally:
        listener.close()
        if uds is not None:
            uds.unlink(missing_ok=True)


def worker(version: str | None) -> Callable[..., str]:
    """How the engine joins a session: as a worker of this process, which serves `version` now."""
    from checkpoint_engine.worker import WeightsState, update_weights_from_ipc

    state = WeightsState()
    if version is not None:
        state.commit(version)

    def receive(
        handle: str,
        *,
        run: Callable[[list[tuple[str, torch.Tensor]]], None],
        post_hook: Callable[[], None],
        model: Recordable | None = None,
    ) -> str:
        return update_weights_from_ipc(None, handle, 0, run=run, post_hook=post_hook, state=state, model=model)

    return receive


def _announce(url: str, port_file: Path | None, json_output: bool) -> None:
    announce(url, json_output=json_output)
    if port_file is not None:
        unfinished = port_file.with_name(f".{port_file.name}.{os.getpid()}")
        unfinished.write_text(url)
        unfinished.replace(port_file)  # whoever waits for the file never reads half of it


def _end_with_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
