"""Our own histograms are those that OpenTelemetry's SDK would have made of the same values."""

from typing import Any

import pytest
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, ExponentialBucketHistogramAggregation

from batchrun.telemetry.genai import SECOND_BUCKETS, TOKEN_BUCKETS
from batchrun.telemetry.histograms import Attributes, Counted
from batchrun.telemetry.otel_export import WithHistograms, takes_buckets
from tests import level

ONE: Attributes = {"model": "a"}
OTHER: Attributes = {"model": "b", "error.type": "500"}


class Kept(MetricExporter):
    """An exporter that keeps what it gets."""

    def __init__(self, temporality: AggregationTemporality, aggregation: Any = None) -> None:
        super().__init__({Histogram: temporality}, aggregation)
        self.points: list[dict[str, Any]] = []

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **more: Any) -> MetricExportResult:
        metrics = [m for r in metrics_data.resource_metrics for s in r.scope_metrics for m in s.metrics]
        self.points.append({metric.name: metric.data.data_points for metric in metrics})
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 30_000, **more: Any) -> None:
        return


def shape(points: Any) -> list[tuple[Any, ...]]:
    """What two histograms must agree on."""
    return sorted(
        (
            *(sorted(point.attributes.items()), point.count, round(point.sum, 6), point.min, point.max),
            *(list(point.bucket_counts), list(point.explicit_bounds)),
        )
        for point in points
    )


@pytest.mark.parametrize("temporality", [AggregationTemporality.CUMULATIVE, AggregationTemporality.DELTA])
@pytest.mark.parametrize("bounds", [SECOND_BUCKETS, TOKEN_BUCKETS])
def test_the_buckets_are_those_of_the_sdk(bounds: tuple[float, ...], temporality: AggregationTemporality) -> None:
    ours = Counted("ours", "s", "", bounds)
    reader, exporter = InMemoryMetricReader({Histogram: temporality}), Kept(temporality)
    periodic = PeriodicExportingMetricReader(WithHistograms(exporter, [ours]), export_interval_millis=1e9)
    theirs = (
        MeterProvider([reader], shutdown_on_exit=False)
        .get_meter("x")
        .create_histogram("theirs", explicit_bucket_boundaries_advisory=bounds)
    )
    mine = MeterProvider([periodic], shutdown_on_exit=False)
    mine.get_meter("batchrun").create_counter("other").add(1)
    random = level.seeded("histograms")
    for _ in range(3):
        for attributes in (ONE, OTHER):
            for _ in range(random.randrange(1, 5)):
                value = random.choice([*bounds, random.uniform(0, 2 * bounds[-1]), 0])
                ours.record(value, attributes)
                theirs.record(value, attributes)
        data: Any = reader.get_metrics_data()
        (metric,) = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics]
        mine.force_flush()
        assert shape(exporter.points[-1]["ours"]) == shape(metric.data.data_points)
    starts = {point.start_time_unix_nano for points in exporter.points for point in points["ours"]}
    assert len(starts) == (1 if temporality is AggregationTemporality.CUMULATIVE else 3)
    mine.shutdown()


def test_exponential_histograms_are_left_to_the_sdk() -> None:
    of = AggregationTemporality.CUMULATIVE
    assert takes_buckets(Kept(of))
    assert takes_buckets(Kept(of, {Histogram: ExplicitBucketHistogramAggregation()}))
    assert not takes_buckets(Kept(of, {Histogram: ExponentialBucketHistogramAggregation()}))
