"""Tensors over memory that torch did not allocate. The same code serves CUDA; here on host memory."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from checkpoint_engine.devices.cudart import CudaRuntime, loaded_libraries
from checkpoint_engine.devices.foreign import tensor_at

CPU = torch.device("cpu")


def test_shares_the_memory_in_both_directions() -> None:
    memory = (ctypes.c_ubyte * 100)(*range(100))
    tensor = tensor_at(ctypes.addressof(memory), 100, CPU)
    assert tensor.dtype == torch.uint8 and tensor.shape == (100,) and tensor.data_ptr() == ctypes.addressof(memory)
    assert tensor.tolist() == list(range(100))
    tensor[3] = 250
    assert memory[3] == 250


def test_released_once_when_the_last_view_is_gone() -> None:
    memory = (ctypes.c_ubyte * 64)()
    released: list[str] = []
    tensor = tensor_at(ctypes.addressof(memory), 64, CPU, lambda: released.append("released"))
    view = tensor[8:24].view(torch.bfloat16).view(2, 4)
    del tensor
    assert released == []
    assert view.shape == (2, 4)
    del view
    assert released == ["released"]


def test_released_from_another_thread() -> None:
    from concurrent.futures import ThreadPoolExecutor

    memory = (ctypes.c_ubyte * 64)()
    released: list[int] = []
    held = [tensor_at(ctypes.addressof(memory), 64, CPU, lambda: released.append(1))]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(held.clear).result(timeout=30)
    assert released == [1]


def test_a_tensor_that_lives_to_the_end_does_not_disturb_the_exit() -> None:
    script = (
        "import ctypes, torch\n"
        "from checkpoint_engine.devices.foreign import tensor_at\n"
        "memory = (ctypes.c_ubyte * 64)()\n"
        "kept = tensor_at(ctypes.addressof(memory), 64, torch.device('cpu'), lambda: print('released late'))\n"
        "torch._kept_beyond_the_end = kept[1:]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_libraries_of_this_process_are_found_by_name() -> None:
    found = loaded_libraries("libc.so") + loaded_libraries("libtorch_cpu")
    assert len(found) >= 2 and all(path.startswith("/") for path in found)
    assert loaded_libraries("libno-such-thing") == []


def test_a_library_without_the_calls_is_refused() -> None:
    with pytest.raises(AttributeError, match="cuda"):
        CudaRuntime(ctypes.CDLL("libm.so.6"))
