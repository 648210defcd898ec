"""Regions that a worker keeps mapped between updates: the same one is mapped once, and given up when it is wanted no longer."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from checkpoint_engine.devices.base import Closing, SharedHandle
from checkpoint_engine.devices.host_regions import HostRegions
from checkpoint_engine.errors import ManifestError, ProtocolError
from checkpoint_engine.memory.region import HostRegion

PAGE = 4096


class Registrar:
    """In an accelerator's place. What is registered now; it can be slow, or refuse."""

    def __init__(self) -> None:
        self.now: list[int] = []
        self.count = 0
        self.go = threading.Event()
        self.go.set()
        self.refuses = False
        self.settled = 0

    def settle(self) -> None:
        self.settled += 1

    def register(self, tensor: torch.Tensor) -> Closing:
        self.go.wait(10)
        if self.refuses:
            raise ManifestError("no more memory may be locked")
        self.count += 1
        self.now.append(tensor.data_ptr())
        return _Registration(self, tensor)


class _Registration(Closing):
    def __init__(self, registrar: Registrar, tensor: torch.Tensor) -> None:
        self._registrar, self._address = registrar, tensor.data_ptr()
        self._still_mapped = tensor

    def close(self) -> None:
        self._registrar.now.remove(self._address)


@pytest.fixture
def registrar() -> Registrar:
    return Registrar()


@pytest.fixture
def kept(registrar: Registrar) -> Iterator[HostRegions]:
    regions = HostRegions(registrar.register, registrar.settle)
    yield regions
    regions.prepare((), ())
    registrar.go.set()
    for thread in [t for t in threading.enumerate() if t.name == "register-region"]:
        thread.join(10)
    assert registrar.now == []


@pytest.fixture
def region() -> Iterator[HostRegion]:
    with HostRegion(3 * PAGE + 5) as region:
        region.tensor.copy_(torch.arange(region.nbytes) % 251)
        yield region


def _handle(region: HostRegion) -> tuple[SharedHandle, int]:
    return SharedHandle("region", region.nbytes), os.dup(region.fd)


def test_a_region_is_registered_once_for_many_updates(registrar: Registrar, kept: HostRegions, region: HostRegion) -> None:
    handle, descriptor = _handle(region)
    kept.prepare([handle], [descriptor])
    for value in range(3):
        region.tensor[7] = value
        with kept.open(*_handle(region)) as mapping:
            assert torch.equal(mapping.tensor, region.tensor)
    assert registrar.count == 1
    assert len(registrar.now) == 1
    assert registrar.settled == 3, "what still reads it was waited for"


def test_a_region_that_was_not_prepared_is_registered_when_it_is_opened(
    registrar: Registrar, kept: HostRegions, region: HostRegion
) -> None:
    with kept.open(*_handle(region)) as mapping:
        assert torch.equal(mapping.tensor, region.tensor)
    assert registrar.count == 1


def test_what_is_wanted_no_longer_is_given_up(registrar: Registrar, kept: HostRegions, region: HostRegion) -> None:
    with HostRegion(PAGE) as other:
        kept.open(*_handle(region)).close()
        handle, descriptor = _handle(other)
        kept.prepare([handle], [descriptor])
        with kept.open(*_handle(other)) as mapping:
            assert registrar.now == [mapping.tensor.data_ptr()]
    kept.prepare((), ())
    assert registrar.now == []


def test_preparing_never_waits_and_opening_does(registrar: Registrar, kept: HostRegions, region: HostRegion) -> None:
    registrar.go.clear()
    handle, descriptor = _handle(region)
    kept.prepare([handle], [descriptor])
    assert registrar.now == []
    threading.Timer(0.05, registrar.go.set).start()
    with kept.open(*_handle(region)) as mapping:
        assert torch.equal(mapping.tensor, region.tensor)


def test_given_up_while_it_is_being_registered(registrar: Registrar, kept: HostRegions, region: HostRegion) -> None:
    registrar.go.clear()
    handle, descriptor = _handle(region)
    kept.prepare([handle], [descriptor])
    kept.prepare((), ())
    registrar.go.set()  # the fixture sees that nothing stays registered


def test_a_refused_registration_is_raised_where_it_is_wanted(registrar: Registrar, kept: HostRegions, region: HostRegion) -> None:
    registrar.refuses = True
    with pytest.raises(ManifestError, match="locked"):
        kept.open(*_handle(region))
    assert not kept.usable
    registrar.refuses = False
    kept.open(*_handle(region)).close()
    assert registrar.count == 1


def test_memory_that_could_shrink_is_refused(kept: HostRegions) -> None:
    descriptor = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, PAGE)
    with pytest.raises(ProtocolError, match="sealed"):
        kept.open(SharedHandle("region", PAGE), descriptor)
