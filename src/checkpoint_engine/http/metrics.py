"""What Prometheus scrapes (docs/metrics.md): histograms of updates that are over, gauges of how things are now."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from checkpoint_engine import __version__
from checkpoint_engine.http.director import Director
from checkpoint_engine.http.records import UpdateRecord

CONTENT_TYPE = CONTENT_TYPE_LATEST
PREFIX = "checkpoint_engine"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 600.0)
"""From a small model's stage on one host to an update that runs into its deadline."""


class Metrics:
    """A registry of its own, so that one process may hold several applications."""

    def __init__(self, director: Director) -> None:
        self._director = director
        self._registry = CollectorRegistry()
        self._updates = self._counter("updates", "Updates that are over, by how they ended.", "result")
        self._failures = self._counter("update_failures", "Updates that failed, by the error's type and stage.", "error", "stage")
        self._bytes = self._counter("update_bytes", "Bytes of tensors that each replica was shown by updates that succeeded.")
        self._stage_bytes = self._counter("stage_bytes", "Bytes that a stage moved, of the rank longest at work in it.", "stage")
        self._seconds = self._histogram(
            "update_duration_seconds", "Seconds of updates that succeeded, without what is around them."
        )
        self._stages = self._histogram("update_stage_seconds", "Seconds at work in a stage, of the slowest rank.", "stage")
        self._pauses = self._histogram("engine_pause_seconds", "For how long updates paused each engine by a call.")
        for result in ("committed", "failed", "cancelled"):  # known from the start, so that a rate of the first is seen
            self._updates.labels(result)
        self._registry.register(_Now(director))

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(name, says, labels, namespace=PREFIX, registry=self._registry)

    def _histogram(self, name: str, says: str, *labels: str) -> Histogram:
        return Histogram(name, says, labels, namespace=PREFIX, registry=self._registry, buckets=SECONDS)

    def count(self, record: UpdateRecord) -> None:
        """An update is over."""
        self._updates.labels(record.state).inc()
        if (error := record.error) is not None and record.state == "failed":
            self._failures.labels(error.type, str(error.names.get("stage", ""))).inc()
        if (report := record.report) is None:
            return
        self._seconds.observe(report["seconds"])
        self._bytes.inc(report["nbytes"])
        for stage, did in report["stages"].items():
            self._stages.labels(stage).observe(did["seconds"])
            self._stage_bytes.labels(stage).inc(did["nbytes"])
        for replica in report.get("replicas", ()):
            if replica["pause_ms"] is not None:
                self._pauses.observe(replica["pause_ms"] / 1e3)

    def render(self) -> bytes:
        """The page, in Prometheus's text format."""
        return generate_latest(self._registry)


class _Now:
    """Made anew at each scrape: nothing of a rank or version that is gone stays behind."""

    def __init__(self, director: Director) -> None:
        self._director = director

    def collect(self) -> Iterator[Metric]:
        view = self._director.view()
        yield InfoMetricFamily(f"{PREFIX}_build", "The version of this package.", {"version": __version__})
        yield GaugeMetricFamily(f"{PREFIX}_ranks", "Ranks of the fleet.", view.world_size)
        running = view.running
        yield GaugeMetricFamily(f"{PREFIX}_update_running", "1 while an update runs.", int(running is not None))
        yield _gauge("update_size_bytes", "Of the update that runs; 0: none, or not known yet.", running.nbytes if running else 0)
        done = min(running.done, default=0) if running else 0
        yield _gauge("update_progress_bytes", "Bytes that every rank has complete of the update that runs.", done)
        if updates := self._director.node.tracker.updates():
            ended = updates[0].started + updates[0].seconds
            yield _gauge("last_update_timestamp_seconds", "When the last update ended, in seconds since the epoch.", ended)
        yield from self._ranks()

    def _ranks(self) -> Iterator[Metric]:
        where = ["rank", "host"]
        up = GaugeMetricFamily(f"{PREFIX}_rank_up", "1: the rank answers rank 0.", labels=where)
        regions = GaugeMetricFamily(f"{PREFIX}_region_bytes", "Host memory that holds checkpoints.", labels=where)
        kept = GaugeMetricFamily(f"{PREFIX}_kept_region_bytes", "Host memory kept for the next checkpoint.", labels=where)
        rings = GaugeMetricFamily(f"{PREFIX}_ring_bytes", "Memory shared with the worker, for buckets.", labels=where)
        held = GaugeMetricFamily(f"{PREFIX}_checkpoints", "Checkpoints in host memory.", labels=where)
        dirty = GaugeMetricFamily(f"{PREFIX}_worker_dirty", "1: the worker's weights are a mixture.", labels=where)
        serves = InfoMetricFamily(f"{PREFIX}_worker_weights", "What the worker serves since its last update.", labels=where)
        for view in self._director.view().ranks:
            labels = [str(view.rank), view.host]
            up.add_metric(labels, int(view.error is None))
            if (state := view.state) is None:
                continue
            regions.add_metric(labels, state.server.region_bytes)
            kept.add_metric(labels, state.server.kept_bytes)
            rings.add_metric(labels, state.server.ring_bytes)
            held.add_metric(labels, len(state.server.checkpoints))
            if state.dirty is not None:
                dirty.add_metric(labels, int(state.dirty))
            if state.version is not None:
                serves.add_metric(labels, {"version": state.version})
        yield from (up, regions, kept, rings, held, dirty, serves)


def _gauge(name: str, says: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", says, value)
