"""What a worker tells of one stream."""

from __future__ import annotations

from checkpoint_engine.timeline import Span
from checkpoint_engine.transport.messages import Again, Loaded, Ready, Spent, StageStats


class Heard:
    """tables: the name under which it has the stream's tables. again: it needs the stream once more. way, reads, needs, sums,
    taken, ahead: as in Ready; way "": it is not ready. notes: of its load plan. spans: as in Spent."""

    def __init__(self) -> None:
        self._load = self._engine = self._hook = 0.0
        self._spent: dict[str, float] = {}
        self._verified = 0
        self.tables = ""
        self.again = False
        self.way = ""
        self.reads = -1
        self.needs = b""
        self.notes: tuple[str, ...] = ()
        self.spans: tuple[Span, ...] = ()
        self.sums = self.taken = b""
        self.ahead = False

    def loaded(self, message: Loaded) -> None:
        self._load += message.seconds
        self._engine += message.inside

    def ended(self, message: Ready | Again) -> None:
        self._tell(message.spent)
        if isinstance(message, Again):
            self.again = True
        else:
            self._hook, self.way, self.reads = message.seconds, message.way, message.pull
            self.needs, self.sums, self.taken = message.needs, message.sums, message.taken
            self.ahead = message.ahead

    def _tell(self, spent: Spent) -> None:
        self._spent, self.notes, self.spans = spent.seconds, spent.notes, spent.spans
        self._verified = spent.verified

    def stats(self, nbytes: int) -> dict[str, StageStats]:
        """nbytes: of the stream's tensors."""
        return {
            "load": StageStats(nbytes, self._load),
            "load_weights": StageStats(nbytes, self._engine),
            "post_hook": StageStats(0, self._hook),
            **{stage: StageStats(self._verified * (stage == "verify"), spent) for stage, spent in self._spent.items()},
        }
