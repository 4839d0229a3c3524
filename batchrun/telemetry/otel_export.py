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

from batchrun.telemetry.histograms import Counted


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
        is_delta = self._temporality is AggregationTemporality.DELTA
        from_ns, now_ns = self._started_ns, time.time_ns()
        if is_delta:
            self._started_ns = now_ns
        ours: list[Metric] = []
        for counted in self._histograms:
            if points := counted.points(restart=is_delta):
                data = [
                    HistogramDataPoint(
                        attributes=point.attributes,
                        start_time_unix_nano=from_ns,
                        time_unix_nano=now_ns,
                        count=point.count,
                        sum=point.sum,
                        bucket_counts=point.counts,
                        explicit_bounds=counted.bounds,
                        min=point.min,
                        max=point.max,
                    )
                    for point in points
                ]
                histograms = Histograms(data, self._temporality)
                ours.append(Metric(counted.name, counted.description, counted.unit, histograms))
        resources = []
        for each in metrics_data.resource_metrics:  # one: that of the provider
            scope, *others = each.scope_metrics  # one: all metrics are ours
            joined = ScopeMetrics(scope.scope, [*scope.metrics, *ours], scope.schema_url)
            resources.append(ResourceMetrics(each.resource, [joined, *others], each.schema_url))
        return self._exporter.export(MetricsData(resources), timeout_millis=timeout_millis, **more)

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **more: Any) -> None:
        self._exporter.shutdown(timeout_millis, **more)
