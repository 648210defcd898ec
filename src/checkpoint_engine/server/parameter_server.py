"""ParameterServer: the contract's class. One per rank, beside one accelerator."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from checkpoint_engine.engines.base import Engine
from checkpoint_engine.engines.rollout import OnFailure, Policy, check_on_failure
from checkpoint_engine.errors import SettingsError, UpdateError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.server.member import Member
from checkpoint_engine.server.report import UpdateReport
from checkpoint_engine.server.request import RequestFunction
from checkpoint_engine.server.restore import Restorer
from checkpoint_engine.server.rollout import Rollout, RolloutReport
from checkpoint_engine.server.served import Commit
from checkpoint_engine.settings import Settings

PUSHED, PUSHED_TOO = "push", "push-2"
"""The names under which `push` registers: the first, or both in turn when the previous one is kept for a failure."""


class ParameterServer(Member):
    """Holds this rank's part of checkpoints in host memory and updates engines from it. A context manager.

    rank, world_size   None: RANK and WORLD_SIZE, or those of torch's default group when auto_pg is False
    auto_pg            True: `init_process_group` makes torch's default group and `update` ends it; False: the caller owns it
    gpu_count          accelerators of this host; None: as many as are visible. Rank r is beside accelerator r % gpu_count
    mem_fraction       at most this part of the smallest free device memory is used
    master_addr, _port where rank 0 is; None: MASTER_ADDR, MASTER_PORT. Its store listens on the port after it
    settings           None: defaults and environment

    Every rank must call the collective methods (gather_metas, update, store_based_barrier, push) in the same order.
    """

    # --- what everybody holds ------------------------------------------------------------------------------------------

    def gather_metas(self, checkpoint_name: str) -> None:
        """Collective: agree on who holds what of the checkpoint. A rank that registered nothing takes part with nothing.

        When no rank holds any, as before `load_metas`, `update` raises. Raises AgreementError, DeadlineError, PeerLostError.
        """
        held = [self._registry[checkpoint_name]] if checkpoint_name in self._registry else []
        regions = held[0].regions if held and self._p2p_store is not None else ()
        self._gatherer.gather(checkpoint_name, held[0].metas() if held else (), self._sources.offer(checkpoint_name, regions))

    def get_metas(self) -> Manifest:
        """The manifest that was gathered or loaded last, with what peers need to read it. Picklable; `to_json` does without."""
        return self._gatherer.current()

    def load_metas(self, metas: Manifest) -> None:
        """Take a manifest that another world gathered."""
        if not isinstance(metas, Manifest):
            raise SettingsError(f"load_metas takes what get_metas returned, not {type(metas).__name__}")
        self._gatherer.load(metas)

    def init_process_group(self, *, timeout: datetime.timedelta = datetime.timedelta(minutes=10)) -> None:
        """Initialise torch's default group, for callers that use it. Under auto_pg it lives until the end of `update`."""
        if dist.is_initialized():
            return
        self._fleet.init_default_group(self._device.backend, timeout)
        self._owns_default_group = True

    def store_based_barrier(self, timeout: datetime.timedelta = datetime.timedelta(minutes=5)) -> None:
        """Collective: return when all ranks have called it. Raises DeadlineError naming who did not, PeerLostError."""
        self._fleet.links.exchange("barrier", b"", timeout.total_seconds())

    # --- update --------------------------------------------------------------------------------------------------------

    def update(
        self,
        checkpoint_name: str,
        req_func: RequestFunction,
        *,
        timeout: datetime.timedelta | None = None,
        ranks: Sequence[int] | None = None,
        version: str | None = None,
        progress: Callable[[int], None] | None = None,
        verify: str | None = None,
        method: str | None = None,
        keep: bool = False,
        on_failure: OnFailure = "abort",
    ) -> UpdateReport:
        """Collective: put the checkpoint into the engines of all ranks, or of `ranks`.

        req_func  called on every rank, in a thread, with [(device uuid, handle)] of all ranks in rank order; asks the
                  engine to call `update_weights_from_ipc` in its workers. Its return proves nothing, its raising ends the
                  update
        timeout   for the whole update; None: Settings.timeout
        ranks     these read what they need from the ranks of the metas that were gathered or loaded; the others need not call
                  this, and return at once with an empty report. None or []: all, by broadcast
        version   what the engines say they serve from then on; None: checkpoint name and 12 digits of its digest
        progress  called with the bytes of each bucket when it is complete on this rank
        verify    None: as Settings.verify, which says what it is. Tensors that changed fail the update in stage "verify"
        method    None: as Settings.method, which says what it is. After "broadcast" workers that pulled before have to register
                  memory again. Of no account with ranks
        keep      with ranks: what this rank reads stays registered, as its part of the checkpoint
        on_failure  the same on all ranks. abort: after a failure engines that loaded something keep a mixture. restore: req_func
                  is called once more, and all get the checkpoint again that was committed last, if it is still registered;
                  the error says that, or why not. Not with `ranks`

        Returns after all workers on all ranks have committed. Raises UpdateError on every rank when it failed on any,
        UpdateInProgressError, CheckpointNotFoundError, AgreementError.
        """
        check_on_failure(on_failure)
        if ranks and on_failure != "abort":
            raise SettingsError(
                "on_failure='restore' cannot be combined with ranks: what receivers read may be gone at its source"
            )
        settings = self._for_update(timeout, verify, method)
        with self._alone(), self.watch.doing(checkpoint_name, version, rollout=False, apart=bool(ranks)) as outcome:
            what = (checkpoint_name, req_func, settings, version, self.watch.moved(progress))
            try:
                return outcome.keep(self._receivers.update(*what, ranks, keep) if ranks else self._updater.update(*what))
            except UpdateError as e:
                if on_failure == "abort":
                    raise
                raise self._restorer(settings).restored(e, req_func) from e

    def declare_served(self, checkpoint_name: str, version: str | None = None) -> None:
        """Say that the engines serve this checkpoint already, which was gathered here: another process put it there. It is what a
        failed update with on_failure="restore" goes back to, if all ranks say so.

        version: as for `update`. Raises CheckpointNotFoundError.
        """
        manifest, _ = self._gatherer.plan(checkpoint_name)
        self._served.last = Commit(manifest, version or manifest.version)

    def _for_update(self, timeout: datetime.timedelta | None, verify: str | None, method: str | None = None) -> Settings:
        settings = self._settings.replace(verify=verify or self._settings.verify, method=method or self._settings.method)
        return settings if timeout is None else settings.replace(timeout=timeout.total_seconds())

    def _restorer(
        self, settings: Settings, alone: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    ) -> Restorer:
        return Restorer(self._fleet, self._gatherer, self._registry, self._updater, self._served, settings, alone)

    def roll_out(
        self,
        checkpoint_name: str,
        *,
        engines: Sequence[Engine],
        policy: Policy | None = None,
        version: str | None = None,
        timeout: datetime.timedelta | None = None,
        progress: Callable[[int], None] | None = None,
        read: bool = False,
        verify: str | None = None,
        keep: bool = False,
    ) -> RolloutReport:
        """Collective: `update` of these engines, with all that belongs around it (pause, reset the cache, publish, resume).

        Engine i serves ranks [i*K, (i+1)*K), K = world size / number of engines. policy: how they are paused, and what follows a
        failure; None: Policy(), which pauses none and goes on without none. read: from the peers that the metas name, as `update`
        with all ranks; keep: as there. All other arguments as for `update`, after gather_metas of the same checkpoint. Raises
        what `update` raises, EngineError, and ReplicaError for another rank's engine; the error's notes say which engines need
        their operator.
        """
        version, policy, settings = version or self.get_metas().version, policy or Policy(), self._for_update(timeout, verify)
        if read and policy.on_failure != "abort":
            raise SettingsError("on_failure='restore' cannot be combined with read: what was read may be gone at its source")
        restorer = self._restorer(settings, self._alone) if policy.on_failure == "restore" else None
        rollout = Rollout(self._fleet.links, engines, policy, settings.timeout, settings.join_timeout, restorer)
        options: dict[str, Any] = {"timeout": timeout, "version": version, "progress": progress, "verify": verify}
        options |= {"ranks": range(self._world_size), "keep": keep} if read else {}
        with self.watch.doing(checkpoint_name, version, rollout=True) as outcome:
            return outcome.keep(rollout.run(lambda request: self.update(checkpoint_name, request, **options), version))

    def push(
        self,
        named_tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        *,
        engines: Sequence[Engine],
        version: str | None = None,
        policy: Policy | None = None,
        timeout: datetime.timedelta | None = None,
        keep: bool = True,
        verify: str | None = None,
    ) -> RolloutReport:
        """Collective: this rank's tensors, together with the other ranks', into `engines`, in one call; see `roll_out`.

        keep: the tensors stay in host memory, which the next push of the same names and shapes uses again; False: it is given
        back at the end. Where the policy is to restore, what was pushed last is kept until this is committed, which takes twice
        the memory. Raises what register_checkpoint, gather_metas and roll_out raise.
        """
        restores = policy is not None and policy.on_failure == "restore"
        if restores and not keep:
            raise SettingsError("on_failure='restore' needs keep=True: there would be nothing to go back to")
        previous = self._served.last.manifest.checkpoint if restores and self._served.last else None
        name = PUSHED_TOO if previous == PUSHED else PUSHED
        self._drop_pushed(previous)
        self.register_checkpoint(name, named_tensors=dict(named_tensors), use_shared_memory_pool=keep)
        try:
            self.gather_metas(name)
            report = self.roll_out(name, engines=engines, policy=policy, version=version, timeout=timeout, verify=verify)
            self._drop_pushed(name)
            return report
        finally:
            if not keep:
                self.unregister_checkpoint(name)

    def _drop_pushed(self, but: str | None) -> None:
        """Unregister what was pushed; but: not this one."""
        for name in (PUSHED, PUSHED_TOO):
            if name != but and name in self._registry:
                self._sources.withdraw(name)
                self._registry.unregister(name)
