"""Timelines of updates: when each stage was at work on which bucket, as pure data and arithmetic on it."""

from checkpoint_engine.timeline.chrome import from_chrome, to_chrome
from checkpoint_engine.timeline.spans import Recorder, Span, Timeline, Trace, coalesce, span_limit
from checkpoint_engine.timeline.summary import StageSummary, Summary, summarise

__all__ = [
    "Recorder",
    "Span",
    "StageSummary",
    "Summary",
    "Timeline",
    "Trace",
    "coalesce",
    "from_chrome",
    "span_limit",
    "summarise",
    "to_chrome",
]
