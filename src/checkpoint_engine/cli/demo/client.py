"""The demo's client: asks one engine the same question over and over, and remembers what it was told and when."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any, Self

import httpx

from checkpoint_engine.errors import EngineRefusedError

_REQUEST_SECONDS = 120.0


def ask(client: httpx.Client, url: str, kind: str, inputs: list[Any]) -> tuple[list[Any], str | None]:
    """What the engine makes of `inputs` (vectors, or lists of token ids), and the version that made it.

    Raises EngineRefusedError, httpx.HTTPError.
    """
    answers: list[Any] = []
    if kind == "embed":
        body = _post(client, f"{url}/embed", {"input": inputs})
        return body["embeddings"], body["version"]
    for prompt in inputs:
        key = "text" if isinstance(prompt, str) else "input_ids"
        body = _post(client, f"{url}/generate", {key: prompt, "sampling_params": {"max_new_tokens": 16}})
        answers.append(body["output_ids"])
    return answers, body["version"]


def _post(client: httpx.Client, url: str, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(url, json=body)
    if response.status_code != 200:
        raise EngineRefusedError(url, response.status_code, response.text)
    answer: dict[str, Any] = response.json()
    return answer


def http_client() -> httpx.Client:
    return httpx.Client(timeout=_REQUEST_SECONDS, trust_env=False)


class Asker:
    """A thread that asks from `with` to its end. Read the results afterwards.

    answers  version -> the different answers that this version gave, each with how often
    failures what went wrong, in words
    gaps     seconds from each answer to the next
    ends     when each answer came, on time.monotonic
    """

    def __init__(self, url: str, kind: str, inputs: list[Any]) -> None:
        self.url, self._kind, self._inputs = url, kind, inputs[:1] if kind == "generate" else inputs
        self.answers: dict[str | None, Counter[str]] = {}
        self.failures: list[str] = []
        self.gaps: list[float] = []
        self.ends: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name=f"ask {url}", daemon=True)

    def _main(self) -> None:
        last = time.monotonic()
        with http_client() as client:
            while not self._stop.is_set():
                try:
                    answer, version = ask(client, self.url, self._kind, self._inputs)
                except (httpx.HTTPError, EngineRefusedError, ValueError, KeyError) as e:
                    self.failures.append(f"{type(e).__name__}: {e}")
                    self._stop.wait(0.05)  # an engine that is gone is not asked a million times
                    continue
                now = time.monotonic()
                self.gaps.append(now - last)
                self.ends.append(now)
                last = now
                self.answers.setdefault(version, Counter())[repr(answer)] += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        # Left by an error, the engine may be gone; then the thread, a daemon, is left to its own deadline.
        self._thread.join(_REQUEST_SECONDS if error is None else 0.5)

    def between(self, start: float, end: float) -> list[float]:
        """Seconds that answers took which were under way in that time, whole or in part."""
        return [gap for gap, at in zip(self.gaps, self.ends, strict=False) if at > start and at - gap < end]

    def summary(self, right: dict[str, list[Any]]) -> dict[str, Any]:
        """answered, failed, longest_gap and median_gap (seconds), by_version (answers), mixed (versions that gave more than
        one answer, or another than the right one, where it is known). right: version -> answers to all questions."""
        expected = {version: {repr(answers[: len(self._inputs)])} for version, answers in right.items()}
        return {
            "engine": self.url,
            "answered": sum(sum(c.values()) for c in self.answers.values()),
            "failed": len(self.failures),
            "failures": self.failures[:3],
            "longest_gap": max(self.gaps, default=0.0),
            "median_gap": statistics.median(self.gaps) if self.gaps else 0.0,
            "by_version": {str(v): sum(c.values()) for v, c in self.answers.items()},
            "mixed": [str(v) for v, c in self.answers.items() if len(c) != 1 or c.keys() != expected.get(str(v), c.keys())],
        }
