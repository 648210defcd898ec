"""Loading a stream of (name, tensor) into a module's parameters, in place and bit for bit, and proving what is there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
import xxhash

from checkpoint_engine.errors import CheckpointError, TensorError


def tensor_digest(tensor: torch.Tensor) -> str:
    """XXH3-128 of the tensor's bytes in row-major order, 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(_raw(tensor).numpy().data)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


class Targets:
    """Where a checkpoint's tensors go in `module`.

    A name is looked up as it is, then without the module's base prefix ("bert.", "model."), then with it, because
    checkpoints of a bare model and of one with a head differ in that. Names of tied tensors stand for one target.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        prefix = getattr(module, "base_model_prefix", "")
        self._prefix = f"{prefix}." if prefix else ""
        self._ignored = [re.compile(p) for p in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()]
        first: dict[int, str] = {}
        self._canonical: dict[str, str] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.required: frozenset[str] = frozenset()
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self._add(name, parameter, first)
        self.required = frozenset(self.tensors)
        for name, buffer in module.named_buffers(remove_duplicate=False):
            self._add(name, buffer, first)

    def _add(self, name: str, tensor: torch.Tensor, first: dict[int, str]) -> None:
        self._canonical[name] = first.setdefault(id(tensor), name)
        self.tensors.setdefault(self._canonical[name], tensor)

    def resolve(self, name: str) -> str | None:
        """The target's name; None for a tensor that this kind of model is known not to need.

        Raises TensorError when the module has no such tensor.
        """
        for candidate in (name, name.removeprefix(self._prefix), self._prefix + name):
            if candidate in self._canonical:
                return self._canonical[candidate]
        if any(pattern.search(name) for pattern in self._ignored):
            return None
        raise TensorError(name, "the engine's model has no tensor of this name")

    def digests(self) -> dict[str, str]:
        """Name -> `tensor_digest` of every parameter, tied ones once."""
        return {name: tensor_digest(self.tensors[name]) for name in sorted(self.required)}

    def missing(self, covered: Iterable[str]) -> list[str]:
        return sorted(self.required.difference(covered))


class LoadPass:
    """One pass of one update over `targets`. began: at least one tensor was written."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._sources: dict[str, str] = {}
        self.began = False

    def begin(self) -> None:
        """The checkpoint comes from its first tensor on, perhaps once more."""
        self._sources.clear()

    def replaying(self, names: Iterable[str]) -> None:
        """Tensors that are put in place without `load`, as `load` did it before."""
        for name in names:
            if (target := self._targets.resolve(name)) is not None:
                self.began = True
                self._sources[target] = name

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy these tensors into the model. All are checked before the first is written.

        Raises TensorError for a name that the model does not have, another shape or dtype, or two tensors that the model
        ties but that are not equal.
        """
        pairs = [(name, target, tensor) for name, tensor in tensors if (target := self._targets.resolve(name)) is not None]
        for name, target, tensor in pairs:
            _check(name, tensor, self._targets.tensors[target])
        with torch.no_grad():
            for name, target, tensor in pairs:
                destination = self._targets.tensors[target]
                other = self._sources.get(target)
                if other is not None and other != name and not torch.equal(_raw(destination), _raw(tensor)):
                    raise TensorError(name, f"the model ties it to {other!r}, whose values differ")
                self.began = True
                self._sources[target] = name
                destination.copy_(tensor)

    def finish(self) -> None:
        """Raises CheckpointError naming the parameters that no tensor of this pass was for."""
        if missing := self._targets.missing(self._sources):
            shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
            raise CheckpointError(f"the checkpoint lacks {len(missing)} of {len(self._targets.required)} parameters: {shown}")


def _check(name: str, tensor: torch.Tensor, target: torch.Tensor) -> None:
    if tensor.shape != target.shape:
        raise TensorError(name, f"its shape is {tuple(tensor.shape)}, the engine's {tuple(target.shape)}")
    if tensor.dtype != target.dtype:
        raise TensorError(name, f"its dtype is {tensor.dtype}, the engine's {target.dtype}")


def expected_digests(targets: Targets, checkpoint: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What `Targets.digests` must say of a model that holds exactly `checkpoint`; parameters it lacks are left out."""
    resolved = {name: targets.resolve(name) for name in checkpoint}
    return {
        target: tensor_digest(checkpoint[name])
        for name, target in sorted(resolved.items())
        if target is not None and target in targets.required
    }
