"""The exception tree. Everything this package raises on purpose is a CheckpointEngineError.

    CheckpointEngineError (RuntimeError)
    ├── SettingsError                 a setting or argument that cannot be used
    ├── CheckpointError               registering or naming a checkpoint
    │   ├── FileFormatError           a file is not a valid safetensors file
    │   ├── TensorError               a tensor cannot be taken (sharded, unknown dtype, sparse, ...)
    │   ├── DuplicateTensorError      one name, two sources
    │   ├── CheckpointExistsError     the name is taken; the checkpoint that holds it is untouched
    │   ├── CheckpointNotFoundError   the name is not registered here, or nothing is registered anywhere
    │   └── CheckpointBusyError       it cannot be unregistered while an update uses it, or while it is being registered
    ├── LoadPlanError                 a recorded load that cannot be made or used
    ├── ManifestError                 what the ranks hold does not fit together
    ├── IntegrityError                bytes that arrived are not those that were registered
    ├── ProtocolError                 a peer speaks another version, or something else entirely
    ├── AgreementError            the ranks did not all come to the same call
    ├── DeadlineError                 a wait ended without what it waited for (also a TimeoutError)
    ├── PeerLostError                 a process at the other end is gone
    ├── TransferError                 a read of a peer's memory failed
    │   ├── RegionGoneError           the peer does not serve that region, or serves another one in its place
    │   └── QuarantineError           memory cannot be used or given back: a read that was given up may still write to it
    ├── DeviceError                   a call to the accelerator's runtime failed
    ├── EngineError                   an inference engine did not do what it was asked
    │   ├── EngineUnreachableError    no answer at its endpoint
    │   ├── EngineRefusedError        it answered with an error
    │   ├── EngineUnsupportedError    it has no way to do that
    │   └── ReplicaError              what another rank's engine did not do
    ├── UpdateInProgressError         this server is already updating
    ├── UpdateError                   raised by `update` on every rank when it failed on any
    └── WorkerUpdateError             raised inside the engine's worker when the update it took part in failed

Messages say which file, tensor, rank or stage it was. Callers of the contract catch RuntimeError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

E = TypeVar("E", bound=BaseException)
NOT_DECODED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what they ought to be."""


class CheckpointEngineError(RuntimeError):
    """Root of the tree. Errors come whole through pickle, with their attributes and notes, as Ray and process pools send them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self), self.args, self.__dict__)


def _unpickled(kind: type[CheckpointEngineError], args: tuple[Any, ...], attributes: dict[str, Any]) -> CheckpointEngineError:
    # Not by its own arguments, which are not kept; and an OSError, as deadlines are, is made by none but OSError.
    error: CheckpointEngineError = OSError.__new__(kind) if issubclass(kind, OSError) else RuntimeError.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    return error


def said(error: BaseException) -> str:
    """What an error says: ours name their own cause, all others are named by their type."""
    return str(error) if isinstance(error, CheckpointEngineError) else f"{type(error).__name__}: {error}"


def bare(error: E) -> E:
    """`error` without the frames that it came through and without its causes: whoever keeps it would keep all that those held,
    rings and other ranks' memory, too."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


class SettingsError(CheckpointEngineError, ValueError):
    """A setting or argument that cannot be used."""


class CheckpointError(CheckpointEngineError):
    """Registering or naming a checkpoint failed."""


class FileFormatError(CheckpointError):
    """`file` is not a valid safetensors file (or `tensor` in it is not a valid tensor)."""

    def __init__(self, file: str, reason: str, tensor: str | None = None) -> None:
        self.file, self.reason, self.tensor = file, reason, tensor
        super().__init__(f"{file}: {f'tensor {tensor!r}: ' if tensor is not None else ''}{reason}")


class TensorError(CheckpointError):
    """Tensor `tensor` cannot be taken."""

    def __init__(self, tensor: str, reason: str) -> None:
        self.tensor, self.reason = tensor, reason
        super().__init__(f"tensor {tensor!r}: {reason}")


class DuplicateTensorError(CheckpointError):
    """Two sources hold a tensor of the same name."""

    def __init__(self, tensor: str, first: str, second: str) -> None:
        self.tensor, self.first, self.second = tensor, first, second
        super().__init__(f"tensor {tensor!r} is in both {first} and {second}")


class CheckpointExistsError(CheckpointError):
    """The name is taken. The checkpoint that holds it stays as it is."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"checkpoint {name!r} is registered already; unregister it first or choose another name")


class CheckpointNotFoundError(CheckpointError, KeyError):
    """The name is not registered, or no rank registered anything under it."""

    def __init__(self, name: str, where: str = "on this rank") -> None:
        self.name = name
        super().__init__(f"checkpoint {name!r} is not registered {where}")

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class CheckpointBusyError(CheckpointError):
    """The checkpoint cannot be unregistered now: an update uses it, or it is still being registered."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"checkpoint {name!r} is in use (an update is running, or it is still being registered)")


class LoadPlanError(CheckpointEngineError):
    """A recorded load cannot be made, read or used; `tensor` says for which tensor, where it is one."""

    def __init__(self, reason: str, tensor: str | None = None) -> None:
        self.reason, self.tensor = reason, tensor
        super().__init__(f"load plan: {f'tensor {tensor!r}: ' if tensor is not None else ''}{reason}")


class ManifestError(CheckpointEngineError):
    """What the ranks hold does not fit together (a tensor with two shapes, a checkpoint too large for its ring, ...)."""


class IntegrityError(CheckpointEngineError):
    """Bytes that arrived are not those that were registered: the digests of `tensors` differ.

    ranks: whose memory the first of them came from, and hosts: theirs; empty where that is not known. takers: the ranks among
    whose slices of it the wrong one is; empty where it was checked whole.
    """

    def __init__(
        self, tensors: Sequence[str], ranks: Sequence[int] = (), hosts: Sequence[str] = (), takers: Sequence[int] = ()
    ) -> None:
        self.tensors, self.ranks, self.takers = tuple(tensors), tuple(ranks), tuple(takers)
        named = [f"{rank} ({host})" for rank, host in zip(ranks, hosts, strict=True)] if hosts else map(str, ranks)
        source = f", from rank {' and '.join(named)}," if ranks else ""
        more = f" (nor are {len(tensors) - 1} more)" if len(tensors) > 1 else ""
        slices = f", in the slices that ranks {' and '.join(map(str, takers))} took" if takers else ""
        slices = slices.replace("ranks", "rank") if len(takers) == 1 else slices
        super().__init__(f"the bytes of tensor {tensors[0]!r}{source} are not those that were registered{more}{slices}")


class ProtocolError(CheckpointEngineError):
    """The other end speaks another protocol version, sent something out of turn, or something else entirely."""


class AgreementError(CheckpointEngineError):
    """The ranks did not all come to the same call: one gave up, is doing something else, or brought an error along."""


class DeadlineError(CheckpointEngineError, TimeoutError):
    """A wait ended without what it waited for."""

    def __init__(self, waited_for: str, seconds: float) -> None:
        self.waited_for, self.seconds = waited_for, seconds
        super().__init__(f"gave up after {seconds:.3g} s waiting for {waited_for}")


class PeerLostError(CheckpointEngineError, ConnectionError):
    """The process at the other end is gone: it exited, was killed, or its host went away."""

    def __init__(self, peer: str, detail: str = "its connection closed") -> None:
        self.peer, self.detail = peer, detail
        super().__init__(f"{peer} is gone ({detail})")


class TransferError(CheckpointEngineError):
    """A read of `peer`'s memory failed in `stage`. region: which of the peer's, where that is known."""

    def __init__(self, peer: str, stage: str, reason: str, region: int | None = None) -> None:
        self.peer, self.stage, self.reason, self.region = peer, stage, reason, region
        super().__init__(f"{peer}, stage {stage}{'' if region is None else f', region {region}'}: {reason}")


class RegionGoneError(TransferError):
    """The peer does not serve that region, or serves another one in its place: the manifest is out of date."""


class QuarantineError(TransferError):
    """Memory cannot be used or given back: a read from `peer` that was given up may still write to it."""


class DeviceError(CheckpointEngineError):
    """`call` to the accelerator's runtime failed with error number `code` (0: it was never made)."""

    def __init__(self, call: str, code: int, reason: str, advice: str = "") -> None:
        self.call, self.code, self.reason, self.advice = call, code, reason, advice
        super().__init__(f"{call} failed: {reason}{f'; {advice}' if advice else ''}")


class EngineError(CheckpointEngineError):
    """The engine at `endpoint` did not do what it was asked."""

    def __init__(self, endpoint: str, reason: str) -> None:
        self.endpoint, self.reason = endpoint, reason
        super().__init__(f"engine at {endpoint}: {reason}")


class EngineUnreachableError(EngineError):
    """No answer at the engine's endpoint."""


class EngineRefusedError(EngineError):
    """The engine answered with an error."""

    def __init__(self, endpoint: str, status: int, body: str) -> None:
        self.status, self.body = status, body
        super().__init__(endpoint, f"answered {status}: {body[:500]}")


class EngineUnsupportedError(EngineError):
    """The engine has no way to do what it was asked; nothing was sent."""


class ReplicaError(EngineError):
    """The engine that rank `rank` asks did not do `stage` (ready, pause, finish). That rank raises the engine's own error."""

    def __init__(self, endpoint: str, rank: int, stage: str, reason: str) -> None:
        self.rank, self.stage = rank, stage
        super().__init__(endpoint, f"{stage} failed on rank {rank}: {reason}")


class UpdateInProgressError(CheckpointEngineError):
    """This server is already updating; two updates at once would mix weights."""


class UpdateError(CheckpointEngineError):
    """An update failed. Raised on every rank that took part, with the same cause.

    rank, host and stage say where it failed first. dirty: this rank's engine may hold a mixture of old and new weights and
    needs a complete update; committed: it serves the new version, for the failure came after that. restored: the version that
    was put back after it (see ParameterServer.update); aftermath: what else is to be said of that, or why it was not.
    """

    def __init__(
        self,
        *,
        rank: int,
        host: str,
        stage: str,
        reason: str,
        dirty: bool = False,
        committed: bool = False,
        restored: str | None = None,
        aftermath: str = "",
    ) -> None:
        self.rank, self.host, self.stage, self.reason, self.dirty = rank, host, stage, reason, dirty
        self.committed, self.restored, self.aftermath = committed, restored, aftermath
        after = f"; {aftermath}" if aftermath else ""
        # The opening words are part of the contract: callers' tests look for them.
        super().__init__(f"Failed to update weights due to remote errors: rank {rank} ({host}), stage {stage}: {reason}{after}")

    def but(self, **changes: Any) -> UpdateError:
        """The same, notes included, with other values of some arguments."""
        names = ("rank", "host", "stage", "reason", "dirty", "committed", "restored", "aftermath")
        new = UpdateError(**{**{name: getattr(self, name) for name in names}, **changes})
        for note in getattr(self, "__notes__", ()):
            new.add_note(note)
        return new


class WorkerUpdateError(CheckpointEngineError):
    """The update this worker took part in failed, here or elsewhere."""

    def __init__(self, reason: str, *, dirty: bool) -> None:
        self.reason, self.dirty = reason, dirty
        state = "weights are a mixture until the next complete update" if dirty else "weights are untouched"
        super().__init__(f"Some workers failed to update weights: {reason} ({state})")
