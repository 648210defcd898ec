"""A holder's side of the list of holders: it tells a server that it is there, again and again, and that it goes."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable
from typing import Any

import httpx

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.engines.http import bearer
from checkpoint_engine.manifest import Manifest

CALL_SECONDS = 30.0
RETRY_SECONDS = 2.0
BEATS = 3
"""Of a lease: two may be lost."""


class Announcer(Closing):
    """From construction to `close`, in a thread of its own.

    url, token  of a server of the world that was joined
    metas       what is held here
    tell        called with a sentence whenever it becomes otherwise: listed, not listed and why, not reached
    """

    def __init__(self, url: str, token: str | None, metas: Manifest, tell: Callable[[str], None]) -> None:
        self._path = f"/v1/holders/{secrets.token_hex(16)}"
        self._body, self._tell, self._said = metas.to_json(), tell, ""
        self._client = httpx.Client(base_url=url.rstrip("/"), headers=bearer(token), timeout=CALL_SECONDS, trust_env=False)
        self._entered = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="announce", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        wait = 0.0
        while not self._stop.wait(wait):
            try:
                lease = self._beat()
                wait = float(lease["seconds"]) / BEATS
                self._say("later joiners are told of this one" if lease["listed"] else f"not listed: {lease['reason']}")
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as e:
                wait, self._entered = RETRY_SECONDS, False
                self._say(f"cannot tell {self._client.base_url} that this one holds the weights: {str(e) or type(e).__name__}")

    def _beat(self) -> dict[str, Any]:
        """Raises httpx.HTTPError, and ValueError for an answer that is none."""
        if self._entered:
            answer = self._client.post(f"{self._path}/renew")
            if answer.status_code != 404:
                return self._read(answer)
        answer = self._client.put(self._path, content=self._body, headers={"Content-Type": "application/json"})
        lease = self._read(answer)
        self._entered = True
        return lease

    def _read(self, answer: httpx.Response) -> dict[str, Any]:
        if answer.status_code != 200:
            raise ValueError(f"it answered {answer.status_code}: {answer.text[:200]}")
        lease: dict[str, Any] = answer.json()
        return lease

    def _say(self, words: str) -> None:
        if words != self._said:
            self._said = words
            self._tell(words)

    def close(self) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(CALL_SECONDS)
        if self._entered:
            with contextlib.suppress(httpx.HTTPError):  # its lease ends anyhow
                self._client.delete(self._path, timeout=RETRY_SECONDS)
        self._client.close()
