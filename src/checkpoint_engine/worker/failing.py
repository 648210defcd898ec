"""What went wrong in which stage of a session."""

from __future__ import annotations

from checkpoint_engine.errors import IntegrityError, said


class Failure(Exception):
    """This worker cannot go on. wrong: names of tensors that are not what was registered."""

    def __init__(self, stage: str, bucket: int, error: BaseException) -> None:
        self.stage, self.bucket = stage, bucket
        self.reason = said(error)
        self.wrong = error.tensors if isinstance(error, IntegrityError) and stage == "verify" else ()


class failing:
    """A context manager: what the block raises is this stage's failure.

    No generator: from Python 3.12 on the error that one turns into another is in a cycle with contextlib's frame, and with it
    all that the frames of the block hold, rings that are mapped, too.
    """

    def __init__(self, stage: str, bucket: int = -1) -> None:
        self._stage, self._bucket = stage, bucket

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise Failure(self._stage, self._bucket, error) from error
