"""What clients of engines over HTTP have in common: one connection pool, deadlines, and errors that name the endpoint."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from typing import Any

import httpx

from checkpoint_engine.engines.base import Engine
from checkpoint_engine.errors import DeadlineError, EngineRefusedError, EngineUnreachableError, SettingsError

_CONNECT_SECONDS = 10.0
_PROBE_SECONDS = 5.0
_PROBE_INTERVAL = 0.05
_NO_SUCH_ROUTE = (404, 405)


def bearer(token: str | None) -> dict[str, str]:
    """The header that shows it; none without one. Raises SettingsError, without the token, for what no header can hold: httpx
    would say all of it."""
    if not token:
        return {}
    if not token.isascii() or not token.isprintable() or " " in token:
        raise SettingsError("a token is printable ASCII without spaces, on one line")
    return {"Authorization": f"Bearer {token}"}


def http_url(text: str) -> httpx.URL:
    """Raises SettingsError for what is no http or https URL with a host."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as e:
        raise SettingsError(f"{text!r} is not a URL: {e}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise SettingsError(f"{text!r} is not an http URL")
    return url


class HttpEngine(Engine):
    """An engine at `url` (http or https), over TCP or, with `uds`, over a Unix socket. token: sent as a bearer token."""

    def __init__(self, url: str, uds: str | None = None, token: str | None = None) -> None:
        http_url(url)
        self.url = url.rstrip("/")
        self.endpoint = f"{self.url} (unix:{uds})" if uds else self.url
        # Engines share memory with this host: whatever proxy the environment names does not lead to them.
        self._client = httpx.Client(transport=httpx.HTTPTransport(uds=uds), headers=bearer(token), trust_env=False)

    def close(self) -> None:
        self._client.close()

    @abstractmethod
    def ready(self, response: httpx.Response) -> bool:
        """Whether this answer to `probe_path` means that the engine can take weights."""

    probe_path: str

    def wait_ready(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        last: httpx.Response | EngineUnreachableError | None = None
        pause = threading.Event()
        while (left := end - time.monotonic()) > 0:
            try:
                last = self._send("GET", self.probe_path, None, min(left, _PROBE_SECONDS))
                if self.ready(last):
                    return
            except DeadlineError:  # it accepted the connection but is busy
                pass
            except EngineUnreachableError as e:
                last = e
            pause.wait(min(_PROBE_INTERVAL, max(0.0, end - time.monotonic())))
        if isinstance(last, EngineUnreachableError):
            raise EngineUnreachableError(self.endpoint, f"{last.reason} (for {seconds:.3g} s)")
        said = f" (its last answer: {last.status_code})" if last is not None else ""
        raise DeadlineError(f"engine at {self.endpoint} to be ready{said}", seconds)

    def request(self, method: str, path: str, body: Any, seconds: float) -> httpx.Response:
        """The answer, of status 2xx. Raises EngineUnreachableError, EngineRefusedError, DeadlineError."""
        response = self._send(method, path, body, seconds)
        if not response.is_success:
            raise EngineRefusedError(self.endpoint, response.status_code, response.text)
        return response

    def request_if_there(self, method: str, path: str, body: Any, seconds: float) -> httpx.Response | None:
        """As `request`; None from a server that has no such route."""
        try:
            return self.request(method, path, body, seconds)
        except EngineRefusedError as e:
            if e.status in _NO_SUCH_ROUTE:
                return None
            raise

    def succeed(self, response: httpx.Response) -> None:
        """Raises EngineRefusedError with the engine's words unless its body says {"success": true}."""
        answer = self.json(response)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            message = answer.get("message") if isinstance(answer, dict) else None
            raise EngineRefusedError(self.endpoint, response.status_code, str(message or response.text))

    def json(self, response: httpx.Response) -> Any:
        """Its body. Raises EngineRefusedError when it is not JSON."""
        try:
            return response.json()
        except ValueError:
            raise EngineRefusedError(self.endpoint, response.status_code, f"not JSON: {response.text}") from None

    def _send(self, method: str, path: str, body: Any, seconds: float) -> httpx.Response:
        end = time.monotonic() + seconds
        timeout = httpx.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))
        try:
            with self._client.stream(method, self.url + path, json=body, timeout=timeout) as response:
                return _read(response, end)
        except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout):
            raise DeadlineError(f"engine at {self.endpoint} to answer {method} {path}", seconds) from None
        except httpx.RequestError as e:  # also a body that is not encoded as it says
            raise EngineUnreachableError(self.endpoint, str(e) or type(e).__name__) from e
        except RuntimeError as e:  # httpx says so when the client was closed
            raise EngineUnreachableError(self.endpoint, str(e)) from e


def _read(response: httpx.Response, end: float) -> httpx.Response:
    """With its body; httpx's own deadline begins anew with each piece of it. Raises httpx.ReadTimeout after `end`."""
    body = bytearray()
    for piece in response.iter_bytes():
        body += piece
        if time.monotonic() > end:
            raise httpx.ReadTimeout("the answer does not end")
    kind = {"content-type": response.headers.get("content-type", "")}
    return httpx.Response(response.status_code, headers=kind, content=bytes(body), request=response.request)
