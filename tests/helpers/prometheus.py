"""What Prometheus's conventions demand of a page of metrics (https://prometheus.io/docs/practices/naming), as promtool checks it
and further: units are base units, and no label has a value for each update, request or tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families

LABELS = {"result", "error", "stage", "rank", "host", "version", "le"}
"""Of few values each; `version` only where the last one replaces the one before."""
NOT_BASE = r"(milliseconds|ms|minutes|hours|kilobytes|kb|megabytes|mb|gb|gib|percent|bits)"
TYPE_WORDS = r"(gauge|counter|histogram|summary)"


def lint(page: str) -> list[str]:
    """What is wrong, one sentence each."""
    found = list(_of_lines(page))
    for family in text_string_to_metric_families(page):
        found += [f"{family.name}: {problem}" for problem in _of_family(family)]
    return found


def _of_lines(page: str) -> Iterator[str]:
    names = re.findall(r"^([a-zA-Z_:][\w:]*)(?:\{| )", page, re.MULTILINE)
    typed = set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))
    helped = set(re.findall(r"^# HELP (\S+) \S", page, re.MULTILINE))
    for name in dict.fromkeys(re.sub(r"_(bucket|sum|count)$", "", n) if n not in typed else n for n in names):
        if name not in typed:
            yield f"{name} has no TYPE"
        if name not in helped:
            yield f"{name} has no HELP"


def _of_family(family: object) -> Iterator[str]:
    name, kind, samples = family.name, family.type, family.samples  # type: ignore[attr-defined]
    if not re.fullmatch(r"checkpoint_engine_[a-z][a-z0-9_]*", name):
        yield "is not in snake case under checkpoint_engine_"
    if re.search(rf"_{NOT_BASE}(_|$)", name):
        yield "is not in a base unit"
    if re.search(rf"_{TYPE_WORDS}(_|$)", name):
        yield "has its type in its name"
    if kind == "counter" and not all(s.name.endswith("_total") for s in samples):
        yield "is a counter without _total"
    if kind != "counter" and name.endswith("_total"):
        yield "is named as a counter and is none"
    if kind == "histogram" and not name.endswith(("_seconds", "_bytes")):
        yield "is a histogram without a unit"
    if name.endswith("_info") and kind == "gauge" and any(s.value != 1 for s in samples):
        yield "is information, whose value is 1"
    if unknown := {label for s in samples for label in s.labels} - LABELS:
        yield f"has labels that may have many values: {sorted(unknown)}"
    if len({str(sorted(s.labels.items())) + s.name for s in samples}) != len(samples):
        yield "has one series twice"
