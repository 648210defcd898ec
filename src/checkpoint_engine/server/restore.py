"""After a failed update: all ranks go back to the checkpoint that they committed last, or all learn why they do not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import msgspec

from checkpoint_engine.errors import AgreementError, CheckpointEngineError, CheckpointNotFoundError, UpdateError
from checkpoint_engine.manifest import hex_digest
from checkpoint_engine.memory.registry import Registry
from checkpoint_engine.server.fleet import Fleet
from checkpoint_engine.server.gather import Gatherer
from checkpoint_engine.server.request import RequestFunction
from checkpoint_engine.server.served import Commit, Served
from checkpoint_engine.server.updater import Updater
from checkpoint_engine.settings import Settings


class _Word(msgspec.Struct, frozen=True, array_like=True):
    """dirty: this rank's engine may hold a mixture. content: of what was committed last; "": nothing. obstacle: why this rank
    cannot put it back."""

    dirty: bool
    version: str = ""
    content: str = ""
    obstacle: str = ""


class Restorer:
    """Owns nothing. settings: of the update that puts back, and for all ranks to come to agree. alone: what keeps other updates
    away from that one."""

    def __init__(
        self,
        fleet: Fleet,
        gatherer: Gatherer,
        registry: Registry,
        updater: Updater,
        served: Served,
        settings: Settings,
        alone: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._fleet, self._gatherer, self._registry = fleet, gatherer, registry
        self._updater, self._served, self._settings, self._alone = updater, served, settings, alone

    def agree(self, dirty: bool) -> Commit | None:
        """Collective: what to go back to; None: no rank is dirty.

        Raises AgreementError on all ranks when one cannot, and as Links.exchange when one is gone.
        """
        commit, obstacle = self._served.last, self._obstacle()
        content = "" if commit is None else hex_digest("".join(rank.digest for rank in commit.manifest.ranks).encode())
        mine = _Word(dirty, commit.version if commit else "", content, obstacle)
        payloads = self._fleet.links.exchange("restore", msgspec.msgpack.encode(mine), self._settings.join_timeout)
        words = [msgspec.msgpack.decode(payload, type=_Word) for payload in payloads]
        if not any(word.dirty for word in words):
            return None
        for rank, word in enumerate(words):
            if word.obstacle:
                raise AgreementError(f"rank {rank}: {word.obstacle}")
            if (word.version, word.content) != (words[0].version, words[0].content):
                raise AgreementError(f"rank {rank} served {word.version!r} before, rank 0 {words[0].version!r}")
        return commit

    def _obstacle(self) -> str:
        if (commit := self._served.last) is None:
            return "no update has succeeded here before"
        name = commit.manifest.checkpoint
        try:
            gathered, _ = self._gatherer.plan(name)
            mine = gathered.ranks[self._fleet.rank].regions
            if gathered.ranks != commit.manifest.ranks or (mine and self._registry[name].metas() != mine):
                return f"checkpoint {name!r} was registered or gathered anew since {commit.version!r} was committed"
        except CheckpointNotFoundError as e:
            return str(e)
        return ""

    def put_back(self, commit: Commit, request: RequestFunction) -> None:
        """Collective, after `agree`. Raises as Updater.update."""
        with self._alone():
            self._updater.update(commit.manifest.checkpoint, request, self._settings, commit.version, None)

    def restored(self, error: UpdateError, request: RequestFunction) -> UpdateError:
        """Collective: put back what was committed last; `error` with what came of it."""
        try:
            if (commit := self.agree(error.dirty)) is None:
                return error.but()
            self.put_back(commit, for_version(request, commit.version))
        except CheckpointEngineError as e:
            return told(error, dirty=error.dirty or (isinstance(e, UpdateError) and e.dirty), why_not=str(e))
        return told(error, dirty=False, restored=commit.version)


def for_version(request: RequestFunction, version: str) -> RequestFunction:
    """The same request, where it tells the engine a version (engines.base.EngineRequest)."""
    of: RequestFunction | None = getattr(request, "of", lambda _: None)(version)
    return request if of is None else of


def told(
    error: UpdateError, *, dirty: bool, restored: str | None = None, why_not: str = "", without: Sequence[str] = ()
) -> UpdateError:
    """`error`, and what became of the workers since. without: engines, and why they were not restored."""
    aftermath = f"not restored: {why_not}" if restored is None else f"{restored!r} was restored"
    if without:
        aftermath += f", but not into the {' nor the '.join(without)}"
    return error.but(dirty=dirty, committed=error.committed and restored is None, restored=restored, aftermath=aftermath)
