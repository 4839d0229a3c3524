"""Adds our own histograms to what OpenTelemetry's SDK exports."""

import time
from collections.abc import Sequence
from typing import Any

from opentelemetry.sdk.metrics import Histogram
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    HistogramDataPoint,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.metrics.export import Histogram as Histograms
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation

from batchrun.telemetry.histograms import Counted, Point


def takes_buckets(exporter: MetricExporter) -> bool:
    """Whether the exporter wants histograms with fixed buckets, and no exponential ones."""
    preferred = exporter._preferred_aggregation or {}
    wanted = preferred.get(Histogram)
    return wanted is None or isinstance(wanted, ExplicitBucketHistogramAggregation)


class WithHistograms(MetricExporter):
    """The exporter, which gets our histograms with everything else."""

    def __init__(self, exporter: MetricExporter, histograms: Sequence[Counted]) -> None:
        super().__init__(exporter._preferred_temporality, exporter._preferred_aggregation)
        self._exporter = exporter
        self._histograms = histograms
        self._temporality = (exporter._preferred_temporality or {}).get(Histogram, AggregationTemporality.CUMULATIVE)
        self._started_ns = time.time_ns()

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **more: Any) -> MetricExportResult:
        """See MetricExporter."""
        resources = [self._with_ours(each) for each in metrics_data.resource_metrics]  # one: that of the provider
        return self._exporter.export(MetricsData(resources), timeout_millis=timeout_millis, **more)

    def _with_ours(self, of_resource: ResourceMetrics) -> ResourceMetrics:
        first, *others = of_resource.scope_metrics  # one: all metrics are ours
        joined = ScopeMetrics(first.scope, [*first.metrics, *self._metrics()], first.schema_url)
        return ResourceMetrics(of_resource.resource, [joined, *others], of_resource.schema_url)

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """See MetricExporter."""
        return self._exporter.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **more: Any) -> None:
        """See MetricExporter."""
        self._exporter.shutdown(timeout_millis, **more)

    def _metrics(self) -> list[Metric]:
        is_delta = self._temporality is AggregationTemporality.DELTA
        from_ns, now_ns = self._started_ns, time.time_ns()
        if is_delta:
            self._started_ns = now_ns
        metrics: list[Metric] = []
        for each in self._histograms:
            if points := each.points(restart=is_delta):
                data = Histograms([_point(point, each.bounds, from_ns, now_ns) for point in points], self._temporality)
                metrics.append(Metric(each.name, each.description, each.unit, data))
        return metrics


def _point(point: Point, bounds: Sequence[float], from_ns: int, now_ns: int) -> HistogramDataPoint:
    return HistogramDataPoint(
        attributes=point.attributes,
        start_time_unix_nano=from_ns,
        time_unix_nano=now_ns,
        count=point.count,
        sum=point.sum,
        bucket_counts=point.counts,
        explicit_bounds=bounds,
        min=point.min,
        max=point.max,
    )
