"""Who may ask: tokens, and pages of other sites that a browser on this host has open."""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response

from checkpoint_engine.errors import SettingsError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

TOKEN_VARIABLE = "CHECKPOINT_ENGINE_SERVE_TOKEN"
SecretSource = Callable[[], str]
OPEN = ("/", "/v1/healthz", "/favicon.ico")
"""Answered without a token: they tell nothing but that a server is there."""


def read_token(path: Path | None) -> str | None:
    """From the file, or the environment; None where there is neither. Raises SettingsError for an unusable one."""
    try:
        token = path.read_text().strip() if path is not None else os.environ.get(TOKEN_VARIABLE)
    except (OSError, UnicodeDecodeError) as e:
        raise SettingsError(f"the token file {path} cannot be read: {e}") from None
    if token is None or (token == "" and path is None):
        return None
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise SettingsError(f"the token of {path or TOKEN_VARIABLE} needs at least 16 printable ASCII characters without spaces")
    return token


def is_loopback(host: str) -> bool:
    """Of an address, or of "localhost"."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware.

    token   None: none is needed, and over TCP only names of this host are answered, so that no other site's page can reach
            the server by a name of its own that leads here
    control (address, port) that answers to `secret()` only, under /control; nothing else answers there
    """

    def __init__(self, app: ASGIApp, token: str | None, control: tuple[str, int] | None, secret: SecretSource) -> None:
        self._app, self._token, self._control, self._secret = app, token, control, secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            status, kind, message = refusal
            body = json.dumps({"error": {"type": kind, "message": message}})
            headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
            await Response(body, status, headers, "application/json")(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str, str] | None:
        """(status, type, message); None: it may go on."""
        headers, path = Headers(scope=scope), scope["path"]
        server = scope.get("server")
        here = (server[0], server[1]) if server else None
        if self._control is not None and here == self._control:
            secret = self._secret()
            if secret and path.startswith("/control/") and _says(headers, secret):
                return None
            return 401, "Unauthorized", "this port is for rank 0"
        if path.startswith("/control/"):
            return 404, "NotFound", "there is no such route here"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return 403, "Forbidden", "requests from pages of other sites are not answered"
        if self._token is not None:
            if path in OPEN or _says(headers, self._token):
                return None
            return 401, "Unauthorized", "say Authorization: Bearer TOKEN, with the token that the server was started with"
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if here is not None and here[1] is not None and not is_loopback(host):
            return 403, "Forbidden", f"without a token this server answers to localhost, not to {host!r}"
        return None


def _says(headers: Headers, secret: str) -> bool:
    said = headers.get("authorization", "").encode()
    return hmac.compare_digest(said, f"Bearer {secret}".encode())
