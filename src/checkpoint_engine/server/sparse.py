"""What a rank knows of what its worker needs, and how an update's first stream is shared by that (planning.sharing).

Nothing depends on its being right: a worker that needs more than what comes loads nothing of that stream, and asks for another
one, which comes whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from checkpoint_engine.devices.base import Device
from checkpoint_engine.errors import AgreementError
from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.planning.sharing import MAX_GROUPS, Shares, plan_shares
from checkpoint_engine.recent import Recent
from checkpoint_engine.server.offer import Offer
from checkpoint_engine.settings import Settings

KEPT_PLANS = 8


class Sparse:
    """What one rank remembers of its updates for the next one."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._needs: Recent[str, bytes] = Recent(KEPT_PLANS)  # by the plan's digest
        self._last: tuple[object, Shares | None] = (None, None)

    def offer(self, offer: Offer, settings: Settings) -> Offer:
        """With what this rank needs; it is forgotten until the update has gone well."""
        needs = self._needs.get(offer.plan, b"")
        self._needs.drop(offer.plan)
        on = settings.sparse == "on" or (settings.sparse == "auto" and self._device.kind == "cpu")
        return msgspec.structs.replace(offer, needs=needs if on else b"")

    def shares(self, offers: Sequence[Offer], plan: Plan, *, copies: bool) -> Shares | None:
        """Who takes part in which bucket of the first stream, the same on all ranks; None: all in all. copies: ranks copy into
        each other's rings, and need no communicator for any set of them.

        Raises AgreementError, on all ranks, when a rank's needs are not of this plan.
        """
        needs, hosts = [offer.needs for offer in offers], [offer.host for offer in offers]
        key = (plan.digest, needs, hosts, copies)
        if self._last[0] != key:
            try:
                self._last = key, plan_shares(plan, needs, hosts, None if copies else MAX_GROUPS)
            except ValueError as e:
                raise AgreementError(f"what a rank needs is not of this plan: rank {e}") from None
        return self._last[1]

    def settle(self, plan: Plan, needs: bytes) -> None:
        """An update has gone well. needs: of Crew."""
        self._needs.put(plan.digest, needs)
