"""Memory that pieces are read into: host memory of its own, somebody else's, or a place in the ring."""

from __future__ import annotations

import contextlib
import logging

import torch

from checkpoint_engine.devices.base import Closing, Device
from checkpoint_engine.errors import DeviceError, QuarantineError, TransferError
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.transport.peer.base import Destination, PeerTransport

log = logging.getLogger(__name__)


class Slot(Closing):
    """Host memory that pieces are read into, and the device copies from.

    place: memory of somebody else's, which the device knows; None: memory of its own, as after `renew`. moved: it is not in
    its place any more
    """

    def __init__(self, device: Device, nbytes: int, place: torch.Tensor | None = None) -> None:
        """Raises CheckpointError or ManifestError when there is no memory for it."""
        self._device, self._nbytes = device, nbytes
        self._destinations: dict[str, tuple[PeerTransport, Destination]] = {}
        self._owned = contextlib.ExitStack()
        self.moved = False
        self.tensor = self._take() if place is None else place

    def _take(self) -> torch.Tensor:
        with contextlib.ExitStack() as stack:
            region = stack.enter_context(HostRegion(self._nbytes))
            stack.enter_context(self._device.register_host(region.tensor))
            self._owned = stack.pop_all()
        return region.tensor

    def destination(self, transport: PeerTransport) -> Destination:
        if transport.kind not in self._destinations:
            self._destinations[transport.kind] = transport, transport.register(self.tensor)
        return self._destinations[transport.kind][1]

    @property
    def quarantined(self) -> bool:
        return any(destination.quarantined for _, destination in self._destinations.values())

    def renew(self) -> None:
        """Other memory: this one may still be written to, and is left to its reads."""
        self.close()
        self.tensor, self.moved = self._take(), True

    def close(self) -> None:
        for transport, destination in self._destinations.values():
            try:
                transport.unregister(destination)
            except (QuarantineError, TransferError) as e:  # its reads keep it alive
                log.warning("%d bytes of host memory are left in quarantine: %s", self._nbytes, e)
        self._destinations.clear()
        self.tensor = self.tensor[:0].clone()  # else it would keep the memory
        self._owned.close()


class Slots(Closing):
    """Slots of host memory that one update after the other reads into. To take them and make them known to a GPU in every update
    left 0.78 of a transport's rate (4.26 GB by shm, H200), where keeping them left 0.92 (benchmarks/RESULTS.md)."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._slots: list[Slot] = []
        self._slot_bytes = 0

    def take(self, count: int, nbytes: int) -> tuple[Slot, ...]:
        """`count` slots of `nbytes` each, those of the last call where they fit; they stay this object's. Raises as Slot."""
        if nbytes != self._slot_bytes:
            self.close()
            self._slot_bytes = nbytes
        while len(self._slots) < count:
            self._slots.append(Slot(self._device, nbytes))
        return tuple(self._slots[:count])

    def close(self) -> None:
        """Until `take` makes new ones."""
        while self._slots:
            slot = self._slots.pop()
            try:
                slot.close()
            except DeviceError as e:  # of a device that fails anyway; the others are closed all the same
                log.warning("%d bytes of host memory were not given back in order: %s", self._slot_bytes, e)


class RingSlot(Slot):
    """A piece's place in the ring: what is read there need not be lifted. For transports that quiesce."""

    def renew(self) -> None:
        """Raises TransferError: the ring cannot move."""
        raise TransferError("this rank", "fetch", "a read that was given up may still write to the ring")
