"""Accelerators behind one small interface: memory shared with another process, streams, events."""

from checkpoint_engine.devices.base import Device, Event, Mapping, Ring, SharedHandle, Stream, get_device

__all__ = ["Device", "Event", "Mapping", "Ring", "SharedHandle", "Stream", "get_device"]
