"""What failed in a session, and in which stage of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from checkpoint_engine.errors import IntegrityError, said


class Failure(Exception):
    """bucket: -1 outside of loading. wrong: names of tensors that are not what was registered."""

    def __init__(self, stage: str, bucket: int, error: BaseException) -> None:
        self.stage, self.bucket = stage, bucket
        self.reason = said(error)
        self.wrong = error.tensors if isinstance(error, IntegrityError) and stage == "verify" else ()


@contextlib.contextmanager
def failing(stage: str, bucket: int = -1) -> Iterator[None]:
    """What the block raises is this stage's failure."""
    try:
        yield
    except Exception as e:
        raise Failure(stage, bucket, e) from e
