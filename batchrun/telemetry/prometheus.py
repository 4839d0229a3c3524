"""A run's figures in Prometheus's text format, version 0.0.4. PURE.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from decimal import Decimal

from batchrun.telemetry.metrics import METRICS
from batchrun.telemetry.samples import Snapshot, Value, samples_of


def render(snapshot: Snapshot) -> bytes:
    """The content of the file."""
    samples, lines = samples_of(snapshot), []
    for metric in METRICS:
        if metric.name not in samples:
            continue
        name = metric.prometheus_name
        lines.append(f"# HELP {name} {metric.help}\n# TYPE {name} {metric.kind}\n")
        for labels, value in samples[metric.name]:
            pairs = (f'{label}="{_escaped(text)}"' for label, text in (snapshot.labels() | labels).items())
            # without a time: node_exporter skips a file with times (its README, "Textfile Collector")
            lines.append(f"{name}{{{','.join(pairs)}}} {_number(value)}\n")
    return "".join(lines).encode("utf-8", "replace")


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: Value) -> str:
    match value:
        case Decimal():
            return f"{value:f}"
        case int():
            return str(int(value))  # an exit code is an enumeration
    return repr(value)
