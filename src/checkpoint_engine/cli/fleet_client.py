"""REST of a serving fleet, as commands use it: one connection pool, deadlines, and the server's errors with their exit codes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import httpx
import typer

from checkpoint_engine import errors
from checkpoint_engine.cli import EXIT_INPUT, EXIT_PEER, EXIT_UPDATE, exit_code_of
from checkpoint_engine.engines.http import bearer, http_url
from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, PeerLostError, ProtocolError, SettingsError

DEFAULT_URL = "http://127.0.0.1:8600"
TOKEN_VARIABLE = "CHECKPOINT_ENGINE_SERVE_TOKEN"
CONNECT_SECONDS, CALL_SECONDS = 10.0, 60.0
SILENCE_SECONDS = 60.0
"""A stream of events that says nothing for so long is dead: the server says something every 15 s."""

Url = Annotated[str, typer.Option("--url", envvar="CHECKPOINT_ENGINE_URL", help="URL of rank 0 of a serving fleet.")]
Socket = Annotated[Path | None, typer.Option("--uds", help="Unix socket of rank 0, instead of its port.")]
TokenFile = Annotated[
    Path | None, typer.Option(help=f"File with the token that the server wants; else {TOKEN_VARIABLE}.", show_default=False)
]


class RemoteError(CheckpointEngineError):
    """What a server answered instead of what it was asked for. problem: type, message, rank, names, notes of its error."""

    def __init__(self, problem: dict[str, Any], status: int) -> None:
        self.problem, self.status = problem, status
        super().__init__(f"{problem.get('type', 'error')}: {problem.get('message', '')}")
        for note in problem.get("notes") or ():
            self.add_note(str(note))

    @property
    def exit_code(self) -> int:
        """As if the command had raised the server's error itself."""
        return problem_code(self.problem, self.status)


def problem_code(problem: dict[str, Any], status: int = 500) -> int:
    """The exit code that stands for a server's error."""
    kind = getattr(errors, str(problem.get("type")), None)
    if isinstance(kind, type) and issubclass(kind, CheckpointEngineError):
        return exit_code_of(kind)
    if status in (502, 503, 504):
        return EXIT_PEER
    return EXIT_INPUT if 400 <= status < 500 else EXIT_UPDATE


def read_token(path: Path | None) -> str | None:
    """From the file, or the environment. Raises SettingsError."""
    try:
        return path.read_text().strip() if path is not None else os.environ.get(TOKEN_VARIABLE) or None
    except (OSError, UnicodeDecodeError) as e:
        raise SettingsError(f"the token file {path} cannot be read: {e}") from None


class FleetClient:
    """A context manager. Calls raise RemoteError; PeerLostError when nobody answers, DeadlineError when not in time."""

    def __init__(self, url: str, uds: Path | None = None, token: str | None = None) -> None:
        """Raises SettingsError for what is no URL, PeerLostError for what is no socket."""
        self.name = f"the server at {url if uds is None else f'unix:{uds}'}"
        base = http_url(url)
        if uds is not None and not uds.is_socket():
            raise PeerLostError(self.name, "there is no such socket")
        transport = httpx.HTTPTransport(uds=str(uds)) if uds is not None else None
        # A fleet is no web site: whatever proxy the environment names does not lead to it.
        self._client = httpx.Client(base_url=base, headers=bearer(token), transport=transport, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.close()

    def get(self, path: str, seconds: float = CALL_SECONDS) -> Any:
        """The answer's JSON."""
        return self._json(self._call("GET", path, None, seconds))

    def download(self, path: str, seconds: float = CALL_SECONDS) -> bytes:
        return self._call("GET", path, None, seconds).content

    def post(self, path: str, body: dict[str, Any], seconds: float = CALL_SECONDS) -> Any:
        return self._json(self._call("POST", path, body, seconds))

    def _call(self, method: str, path: str, body: dict[str, Any] | None, seconds: float) -> httpx.Response:
        timeout = httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
        try:
            response = self._client.request(method, path, json=body, timeout=timeout)
        except httpx.TimeoutException:
            raise DeadlineError(f"{self.name} to answer {method} {path}", seconds) from None
        except httpx.RequestError as e:
            raise PeerLostError(self.name, str(e) or type(e).__name__) from None
        self._check(response)
        return response

    def events(self, path: str) -> Iterator[tuple[str, Any]]:
        """(event, data) of a stream of server-sent events, until the server ends it."""
        timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
        try:
            with self._client.stream("GET", path, timeout=timeout) as response:
                if not response.is_success:
                    response.read()
                    self._check(response)
                kind = ""
                for line in response.iter_lines():
                    if line.startswith("event: "):
                        kind = line.removeprefix("event: ")
                    elif line.startswith("data: "):
                        yield kind, json.loads(line.removeprefix("data: "))
        except httpx.TimeoutException:
            raise DeadlineError(f"{self.name} to go on with {path}", SILENCE_SECONDS) from None
        except httpx.RequestError as e:
            raise PeerLostError(self.name, str(e) or type(e).__name__) from None
        except ValueError as e:
            raise ProtocolError(f"{self.name} sends events that are not JSON: {e}") from None

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError:
            raise ProtocolError(f"{self.name} answered what is not JSON: {response.text[:200]}") from None

    def _check(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        try:
            problem = dict(response.json()["error"])
        except (ValueError, TypeError, KeyError):
            raise ProtocolError(f"{self.name} answered {response.status_code}: {response.text[:200]}") from None
        error = RemoteError(problem, response.status_code)
        if response.status_code == 401:
            error.add_note(f"give the token by --token-file or {TOKEN_VARIABLE}")
        raise error
