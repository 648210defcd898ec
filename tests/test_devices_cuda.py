"""CUDA, piece by piece: `pytest -m gpu tests/test_devices_cuda.py`. With two devices a few more run."""

from __future__ import annotations

import json
import mmap
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_engine.errors import DeadlineError, DeviceError, ManifestError, ProtocolError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False: no CUDA device here"),
]

if torch.cuda.is_available():
    from checkpoint_engine.devices import get_device
    from checkpoint_engine.devices.base import SharedHandle
    from checkpoint_engine.devices.cuda import CudaDevice, CudaRing
    from checkpoint_engine.devices.cudart import ALREADY_REGISTERED, NOT_REGISTERED, runtime
    from checkpoint_engine.devices.nccl import NcclCommunicator, nccl_version, unique_id
    from checkpoint_engine.devices.probe import probe
    from checkpoint_engine.devices.spans import Spans

MIB = 1 << 20
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture
def device() -> CudaDevice:
    device = get_device("cuda", 0)
    assert isinstance(device, CudaDevice)
    device.bind_thread()
    return device


class Peer:
    """tests/cuda_peer.py in a process of its own, which sees device `index` only, as its number 0."""

    def __init__(self, index: int) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        chosen = visible.split(",")[index] if visible else str(index)
        root = Path(__file__).parent
        path = os.pathsep.join([str(root.parent / "src"), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(root / "cuda_peer.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": chosen, "PYTHONPATH": path},
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # NCCL_DEBUG writes here too
                self._answers.put(line)
        self._answers.put('{"error": "EOFError", "text": "the peer is gone"}')

    def ask(self, do: str, **arguments: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        reply = json.loads(self._answers.get(timeout=50))
        assert "error" not in reply, reply
        return reply["value"]

    def call(self, do: str, **arguments: object) -> Any:
        self.ask(do, **arguments)
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait(30)
        self._reader.join(30)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def peer() -> Iterator[Callable[[int], Peer]]:
    peers: list[Peer] = []

    def start(index: int) -> Peer:
        peers.append(Peer(index))
        return peers[-1]

    yield start
    for each in peers:
        each.end()


def memfd(nbytes: int) -> torch.Tensor:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, nbytes)
    memory = mmap.mmap(descriptor, nbytes)
    os.close(descriptor)
    return torch.frombuffer(memory, dtype=torch.uint8)


def hold(stream: Any, milliseconds: float = 200) -> None:
    """Keep the stream busy for about so long."""
    stream.call(lambda: torch.cuda._sleep(int(milliseconds * 2e6)))  # type: ignore[no-untyped-call]


def test_errors_name_the_call_and_do_not_stick(device: CudaDevice) -> None:
    with pytest.raises(DeviceError, match="cudaFree failed") as caught:
        runtime().free(12345)
    assert caught.value.call == "cudaFree" and caught.value.code
    assert int(torch.ones(8, device=device.torch_device).sum()) == 8  # torch does not stumble over the old error
    with pytest.raises(DeviceError, match="64 bytes, not 3"):
        runtime().ipc_open(b"abc")
    with pytest.raises(DeviceError, match="visible devices"):
        CudaDevice(99)


def test_identity(device: CudaDevice) -> None:
    assert device.uuid.startswith("GPU-") and len(device.uuid) == len("GPU-") + 36
    bus_id = runtime().pci_bus_id(0)
    assert bus_id.count(":") == 2
    assert device.free_bytes() > 0
    from checkpoint_engine.devices import numa

    assert numa.gpu_node(0) is None or numa.gpu_node(0) in numa.online_nodes()


@pytest.mark.parametrize("nbytes", [1, 4097, 2 * MIB + 1])
def test_ring_is_a_tensor_of_our_own_memory(device: CudaDevice, nbytes: int) -> None:
    with device.allocate_ring(nbytes) as ring:
        assert isinstance(ring, CudaRing)
        tensor = ring.tensor
        assert tensor.shape == (nbytes,) and tensor.dtype == torch.uint8 and tensor.device == device.torch_device
        assert runtime().pointer_device(tensor.data_ptr()) == 0
        tensor.fill_(3)
        assert int(tensor.sum(dtype=torch.int64)) == 3 * nbytes
        del tensor
    ring.close()


def test_ring_memory_comes_back(device: CudaDevice) -> None:
    with device.allocate(MIB):  # whatever the first allocation sets up
        pass
    before = device.free_bytes()
    with device.allocate(256 * MIB):
        assert device.free_bytes() <= before - 256 * MIB
    assert device.free_bytes() >= before - 2 * MIB


def test_ring_too_large(device: CudaDevice) -> None:
    with pytest.raises(ManifestError, match="bytes free"):
        device.allocate_ring(1 << 50)
    with device.allocate_ring(MIB) as ring:
        assert int(ring.tensor.fill_(1).sum(dtype=torch.int64)) == MIB


def test_copies_from_registered_memory(device: CudaDevice) -> None:
    source = memfd(8 * MIB + 5)
    source.copy_(torch.randint(0, 256, source.shape, dtype=torch.uint8))
    with (
        device.register_host(source),
        device.allocate(source.numel()) as target,
        device.stream("lift") as lift,
    ):
        for start, stop in ((0, 1), (1, 4098), (4098, MIB), (MIB, MIB), (MIB, source.numel())):
            lift.copy(target.tensor[start:stop], source[start:stop])
        event = lift.record()
        assert event.wait(20) and event.done()
        assert torch.equal(target.tensor.cpu(), source)


def test_copying_does_not_block_the_caller(device: CudaDevice) -> None:
    """Behind a busy stream a copy from registered memory is only queued; torch would fall back to a blocking one if it
    took the memory for pageable."""
    source = memfd(MIB)
    with device.register_host(source), device.allocate(MIB) as target, device.stream("lift") as lift:
        source.fill_(5)
        hold(lift, 500)
        lift.copy(target.tensor, source)
        event = lift.record()
        assert not event.done()
        assert not event.wait(0.001)
        assert event.wait(20)
        assert int(target.tensor.sum(dtype=torch.int64)) == 5 * MIB


def test_after_orders_two_streams_and_busy_measures(device: CudaDevice) -> None:
    with device.allocate(MIB) as a, device.allocate(MIB) as b, device.stream("lift") as lift, device.stream("share") as share:
        a.tensor.zero_()
        b.tensor.fill_(8)
        target = torch.zeros_like(a.tensor)
        device.synchronize()
        since = lift.record()
        hold(lift)
        lift.copy(a.tensor, b.tensor)
        lifted = lift.record()
        share.after(lifted)
        share.copy(target, a.tensor)
        shared = share.record()
        assert shared.wait(20) and lifted.done()
        assert int(target.sum(dtype=torch.int64)) == 8 * MIB
        assert 0 < lift.busy(since, lifted) < 20


def test_a_clock_tells_when_events_of_any_stream_were(device: CudaDevice) -> None:
    """On the host's clock: after what was before them on the host, before what was after."""
    with device.allocate(MIB) as a, device.allocate(MIB) as b, device.stream("lift") as lift, device.stream("share") as share:
        device.synchronize()
        clock = lift.clock()
        spans = Spans()
        spans.begin(clock)
        before = time.perf_counter()
        since = share.record()
        hold(share)
        share.copy(a.tensor, b.tensor)
        until = share.record()
        spans.add(share, since, until)
        assert until.wait(20)
        after = time.perf_counter()
        seconds, ((began, ended),) = spans.take()
        slack = 0.005  # a time slice of another process, and what reading two clocks one after the other costs
        assert before - slack <= began < ended <= after + slack
        assert ended - began == pytest.approx(seconds)
        assert spans.take() == (0.0, [])


def test_call_runs_on_the_stream(device: CudaDevice) -> None:
    seen: list[int] = []
    with device.stream("share") as share:
        share.call(lambda: seen.append(torch.cuda.current_stream().cuda_stream))
        assert seen == [share.raw.cuda_stream]  # type: ignore[attr-defined]
    assert torch.cuda.current_stream().cuda_stream not in seen


def test_waiting_in_another_thread(device: CudaDevice) -> None:
    with device.stream("lift") as lift:
        hold(lift)
        event, results = lift.record(), []

        def wait() -> None:
            device.bind_thread()
            results.append(event.wait(20))

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(30)
        assert results == [True]


def test_registering_twice_and_again(device: CudaDevice) -> None:
    source = memfd(MIB)
    first = device.register_host(source)
    with pytest.raises(ManifestError, match="cudaHostRegister") as caught:
        device.register_host(source)
    assert isinstance(caught.value.__cause__, DeviceError) and caught.value.__cause__.code == ALREADY_REGISTERED
    address = source.data_ptr()
    first.close()
    first.close()
    with pytest.raises(DeviceError) as gone:
        runtime().host_unregister(address)
    assert gone.value.code == NOT_REGISTERED
    device.register_host(source).close()
    device.register_host(source[:0]).close()


def test_ring_in_another_process(device: CudaDevice, peer: Callable[[int], Peer]) -> None:
    nbytes = 3 * MIB + 7
    with device.allocate_ring(nbytes) as ring:
        ring.tensor.fill_(2)
        device.synchronize()
        handle, descriptors = ring.share()
        assert handle.kind == "cuda_ipc" and len(handle.token) == 64 and descriptors == ()
        other = peer(0)
        assert other.call("uuid") == device.uuid
        assert other.call("map", token=handle.token.hex(), nbytes=nbytes) == [2, 2, 2 * nbytes]
        assert ring.tensor[:3].tolist() == [2, 9, 9] and int(ring.tensor[-1]) == 9
        assert other.call("close") == [9, 9, 9, 9]
        assert other.call("map", token=handle.token.hex(), nbytes=nbytes)[:2] == [2, 9]  # and again
        assert other.call("close") == [9, 9, 9, 9]


@two_devices
def test_ring_on_a_device_that_the_worker_numbers_differently(peer: Callable[[int], Peer]) -> None:
    device = get_device("cuda", 1)
    device.bind_thread()
    with device.allocate_ring(MIB) as ring:
        ring.tensor.fill_(4)
        device.synchronize()
        other = peer(1)
        assert other.call("uuid") == device.uuid
        assert other.call("map", token=ring.share()[0].token.hex(), nbytes=MIB) == [4, 4, 4 * MIB]
        assert other.call("close") == [9, 9, 9, 9]


def test_handles_that_cannot_be_mapped(device: CudaDevice) -> None:
    with device.allocate_ring(MIB) as ring, pytest.raises(ProtocolError, match="PID and IPC namespaces"):
        device.open_ring(ring.share()[0], ())  # not in the process that made it
    with pytest.raises(ProtocolError, match="64 bytes"):
        device.open_ring(SharedHandle("cuda_ipc", MIB, b"short"), ())
    read, write = os.pipe()
    os.close(write)
    with pytest.raises(ProtocolError, match="memfd"):
        device.open_ring(SharedHandle("memfd", MIB), (read,))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)  # taken, and closed
    assert int(torch.ones(8, device=device.torch_device).sum()) == 8


def test_communicator_of_one(device: CudaDevice) -> None:
    assert nccl_version() >= 21800
    source = torch.arange(250, dtype=torch.uint8, device=device.torch_device)
    target = torch.zeros_like(source)
    device.synchronize()
    with device.stream("share") as share, NcclCommunicator(unique_id(), 0, 1, 0, timeout=40) as communicator:
        communicator.broadcast(target, source, 0, share.raw.cuda_stream, timeout=40)  # type: ignore[attr-defined]
        assert share.record().wait(20)
        communicator.check()
        assert torch.equal(target, source)
        assert communicator.abort() and communicator.abort()
        with pytest.raises(DeviceError, match="was aborted"):
            communicator.broadcast(target, source, 0, share.raw.cuda_stream, timeout=1)  # type: ignore[attr-defined]


def test_communicator_that_nobody_joins(device: CudaDevice) -> None:
    with pytest.raises(DeadlineError, match="all 2 ranks"):
        NcclCommunicator(unique_id(), 0, 2, 0, timeout=2)
    assert int(torch.ones(8, device=device.torch_device).sum()) == 8


@pytest.mark.timeout(180)
@two_devices
def test_communicator_of_two_and_its_abort(device: CudaDevice, peer: Callable[[int], Peer]) -> None:
    """A broadcast that the other rank never posts: abort frees the stream, and a new communicator works."""
    other, nbytes = peer(1), 8 * MIB
    assert other.call("uuid") != device.uuid
    source = torch.full((nbytes,), 6, dtype=torch.uint8, device=device.torch_device)
    target = torch.zeros_like(source)
    device.synchronize()
    with device.stream("share") as share:
        raw = share.raw.cuda_stream  # type: ignore[attr-defined]

        def join(max_ctas: int | None) -> NcclCommunicator:
            token = unique_id()
            other.ask("join", token=token.hex(), rank=1, size=2, max_ctas=max_ctas)
            made = NcclCommunicator(token, 0, 2, 0, timeout=40, max_ctas=max_ctas)
            assert other.answer() == 1
            return made

        def both(communicator: NcclCommunicator, root: int, value: int) -> None:
            other.ask("broadcast", nbytes=nbytes, root=root)
            communicator.broadcast(target, source, root, raw, timeout=40)
            assert share.record().wait(40)
            assert other.answer() == [value, value, value * nbytes]
            assert int(target.sum(dtype=torch.int64)) == value * nbytes

        before = device.free_bytes()
        communicator = join(None)
        both(communicator, 0, 6)
        both(communicator, 1, 2)
        print(f"a communicator of two holds {(before - device.free_bytes()) / MIB:.0f} MiB")
        communicator.broadcast(target, source, 1, raw, timeout=40)  # a root may finish alone, a receiver cannot
        stuck = share.record()
        assert not stuck.wait(0.2)
        assert communicator.abort()
        assert stuck.wait(20)
        assert other.call("leave")

        before = device.free_bytes()
        communicator = join(8)
        both(communicator, 1, 2)
        print(f"with 8 channels at most: {(before - device.free_bytes()) / MIB:.0f} MiB")
        communicator.broadcast(target, source, 1, raw, timeout=40)
        stuck = share.record()
        other.process.kill()  # and now the other rank dies
        other.process.wait(30)
        assert communicator.abort()
        assert stuck.wait(20)
        assert int(torch.ones(8, device=device.torch_device).sum()) == 8


@pytest.mark.timeout(180)
def test_probe() -> None:
    found = probe("cuda", ranks=min(2, torch.cuda.device_count()), sizes=(MIB,), region_bytes=64 * MIB, seconds=0.05, timeout=120)
    assert all(rate > 1e9 for rate in (*found.h2d_alone, *found.h2d_together, *found.device_copy))
    assert len(found.broadcast) == (1 if len(found.names) > 1 else 0)
    print(found.to_json().decode())
