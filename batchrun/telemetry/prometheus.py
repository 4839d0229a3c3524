"""A run's figures in Prometheus's text format, version 0.0.4. PURE.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/. No sample has a time, because node_exporter's
textfile collector skips a file with times (its README, "Textfile Collector").
"""

from collections.abc import Iterator
from decimal import Decimal

from batchrun.telemetry.metrics import METRICS
from batchrun.telemetry.samples import Snapshot, Value


def render(snapshot: Snapshot) -> bytes:
    """The content of the file."""
    return "".join(_lines(snapshot)).encode("utf-8", "replace")


def _lines(snapshot: Snapshot) -> Iterator[str]:
    for metric in METRICS:
        name, samples = metric.prometheus_name, list(metric.present(snapshot))
        if samples:
            yield f"# HELP {name} {metric.help}\n# TYPE {name} {metric.kind}\n"
        for labels, value in samples:
            pairs = (f'{label}="{_escaped(text)}"' for label, text in (snapshot.labels() | labels).items())
            yield f"{name}{{{','.join(pairs)}}} {_number(value)}\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: Value) -> str:
    match value:
        case Decimal():
            return f"{value:f}"
        case int():
            return str(int(value))  # an exit code is an enumeration
    return repr(value)
