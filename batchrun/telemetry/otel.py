"""A run as OpenTelemetry metrics and traces, configured by the standard OTEL_* variables. Sole importer of it.

Exporters work in separate threads, so a collector that is slow or gone costs the run nothing but a warning, and a
few seconds at its end. Nothing of a prompt or an answer is in it, nor the words of a server, which may repeat them.
"""

import functools
import importlib.metadata
import logging
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from opentelemetry import context, metrics, trace
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from batchrun import __version__
from batchrun.errors import JobError
from batchrun.job.job import Job
from batchrun.records import CompletionRecord, Ending, Notice
from batchrun.telemetry import genai
from batchrun.telemetry.histograms import Counted
from batchrun.telemetry.metrics import METRICS, Metric
from batchrun.telemetry.otel_export import WithHistograms, takes_buckets
from batchrun.telemetry.samples import Labels, Samples, Snapshot, samples_of

FLUSH_S = 5.0
"""How long the last figures may take at the end of a run."""

MOST_WORDS = 200  # characters of an exporter's warning, which may hold a whole response


def exporter(signal: str) -> type[Any] | None:
    """The class that exports `metrics` or `traces`, as OTEL_METRICS_EXPORTER or OTEL_TRACES_EXPORTER says; None: none.

    Raises:
        JobError: its package is not installed.
    """
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    if (name := os.environ.get(variable) or "otlp") == "none":
        return None
    if name == "otlp":
        of_signal = f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL"
        variable = of_signal if os.environ.get(of_signal) else "OTEL_EXPORTER_OTLP_PROTOCOL"
        name = "otlp_proto_grpc" if os.environ.get(variable) == "grpc" else "otlp_proto_http"
    for entry in importlib.metadata.entry_points(group=f"opentelemetry_{signal}_exporter", name=name):
        loaded: type[Any] = entry.load()
        return loaded
    package = f"opentelemetry-exporter-{name.replace('_', '-')}"
    raise JobError(f"{variable}={os.environ.get(variable)}: no such exporter here; pip install {package}")


class OpenTelemetry:
    """The telemetry of one start of a run. Call `end` at its end.

    A program that has set up OpenTelemetry itself gets everything through its own providers.
    """

    def __init__(self, job: Job, note: Callable[[str], None]) -> None:
        """`note` gets one line if something can't be delivered, in any thread."""
        self._job = job
        self._note: Callable[[str], None] | None = note
        self._samples: Samples = {}
        self._labels: Labels = {}
        self._chunks: dict[int, tuple[Span, int, int]] = {}
        self._sets = genai.AttributeSets(genai.job_attributes(job))
        self._own: list[MeterProvider | TracerProvider] = []
        logging.getLogger("opentelemetry").addHandler(_Once(self._warn))
        histograms = (
            Counted(genai.DURATION, "s", "GenAI operation duration.", genai.SECOND_BUCKETS),
            Counted(genai.TIME_TO_FIRST_CHUNK, "s", "Time to the first chunk of a stream.", genai.SECOND_BUCKETS),
            Counted(genai.TOKEN_USAGE, "{token}", "Number of input and output tokens used.", genai.TOKEN_BUCKETS),
        )
        meters, are_counted = self._meters(histograms)
        meter = meters.get_meter("batchrun", __version__)
        self._tracer = self._tracers().get_tracer("batchrun", __version__)
        if meters not in _RUNS:
            runs: list[OpenTelemetry] = []
            _RUNS[meters] = runs
            for metric in METRICS:
                made = meter.create_observable_gauge if metric.kind == "gauge" else meter.create_observable_counter
                made(metric.name, [functools.partial(_observe, runs, metric)], metric.unit, metric.help)
        self._at_work = _RUNS[meters]
        self._at_work.append(self)
        self._durations, self._first_chunks, self._usage = (
            # a program's own SDK takes nothing but its own instruments
            each
            if are_counted
            else meter.create_histogram(
                each.name, each.unit, each.description, explicit_bucket_boundaries_advisory=each.bounds
            )
            for each in histograms
        )
        carrier = {name: os.environ.get(name.upper(), "") for name in ("traceparent", "tracestate")}
        parent = TraceContextTextMapPropagator().extract(carrier, context.get_current())
        self._run = self._tracer.start_span("batchrun.run", parent, attributes={"batchrun.job": job.name})
        self._in_run = trace.set_span_in_context(self._run)

    def show(self, snapshot: Snapshot) -> None:
        """The metrics are these from now on, at each export."""
        self._labels, self._samples = snapshot.labels("batchrun."), samples_of(snapshot)

    def chunk_opened(self, chunk: int, first_row: int, rows: int) -> None:
        """The chunk's rows are being sent."""
        if chunk not in self._chunks:
            attributes = {"batchrun.chunk": chunk, "batchrun.first_row": first_row, "batchrun.rows": rows}
            span = self._tracer.start_span("batchrun.chunk", self._in_run, attributes=attributes)
            self._chunks[chunk] = span, first_row, first_row + rows

    def chunk_sealed(self, chunk: int) -> None:
        """The chunk's rows are settled, and its part is written."""
        if (known := self._chunks.pop(chunk, None)) is not None:
            known[0].end()

    def settled(self, endings: Sequence[Ending]) -> None:
        """These attempts are durable."""
        share = self._job.telemetry.request_spans
        for ending in endings:
            of_request, of_input, of_output = self._sets.of(ending)
            if (usage := ending.usage) is not None:
                self._usage.record(usage.prompt_tokens, of_input)
                self._usage.record(usage.billed_output_tokens, of_output)
            if not isinstance(ending, CompletionRecord):
                continue  # its record has no duration
            self._durations.record(ending.latency_s, of_request)
            if ending.time_to_first_token_s is not None:
                self._first_chunks.record(ending.time_to_first_token_s, of_request)
            if share and random.random() < share:
                self._add_request(ending, of_request)

    def end(self, snapshot: Snapshot, *, with_metrics: bool) -> None:
        """Everything is delivered, as far as that takes no longer than FLUSH_S."""
        summary = snapshot.summary
        self._samples = {}
        if with_metrics:
            self.show(snapshot)
        for span, _, _ in self._chunks.values():
            span.set_attribute("batchrun.sealed", False)
            span.end()
        facts: genai.Attributes = {
            "run_id": summary.run_id,
            "state": summary.state,
            "rows": summary.rows,
            "pending": summary.pending,
        }
        facts |= {"exit_code": summary.exit_code or 0, "invocation": summary.invocation}
        self._run.set_attributes({f"batchrun.{name}": value for name, value in facts.items()})
        if summary.exit_code:
            self._run.set_attribute("error.type", f"exit {summary.exit_code}")
            self._run.set_status(Status(StatusCode.ERROR))
        self._run.end()
        until_s = time.monotonic() + FLUSH_S
        flushing = [threading.Thread(target=self._shut_down, args=[each], daemon=True) for each in self._own]
        for thread in flushing:
            thread.start()
        for thread in flushing:
            thread.join(max(0.0, until_s - time.monotonic()))
        if any(thread.is_alive() for thread in flushing):
            self._warn(f"the last figures were not delivered within {FLUSH_S:g} s")
        self._at_work.remove(self)

    def _shut_down(self, provider: MeterProvider | TracerProvider) -> None:
        try:
            if isinstance(provider, MeterProvider):
                provider.shutdown(timeout_millis=FLUSH_S * 1000)
            else:
                provider.shutdown()
        except Exception as error:  # an exporter may raise anything
            self._warn(_without_secrets(str(error)))

    def _meters(self, histograms: Sequence[Counted]) -> tuple[metrics.MeterProvider, bool]:
        """The provider of the instruments, and whether it exports the `histograms`."""
        if isinstance(existing := metrics.get_meter_provider(), MeterProvider):
            return existing, False
        if (made := exporter("metrics")) is None:
            return metrics.NoOpMeterProvider(), False
        chosen = made()
        if isinstance(chosen, MetricReader):
            reader, are_counted = chosen, False
        else:
            are_counted = takes_buckets(chosen)
            exports = WithHistograms(chosen, histograms) if are_counted else chosen
            reader = PeriodicExportingMetricReader(exports)
        self._own.append(own := MeterProvider([reader], _resource(), shutdown_on_exit=False))
        return own, are_counted

    def _tracers(self) -> trace.TracerProvider:
        if isinstance(existing := trace.get_tracer_provider(), TracerProvider):
            return existing
        if (made := exporter("traces")) is None:
            return trace.NoOpTracerProvider()
        own = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        own.add_span_processor(BatchSpanProcessor(made()))
        self._own.append(own)
        return own

    def observations(self, metric: Metric) -> Iterator[Observation]:
        """The metric's values now; none before the first summary."""
        for labels, value in self._samples.get(metric.name, ()):
            number = int(value) if isinstance(value, int) else float(value)
            yield Observation(number, self._labels | labels)

    def _add_request(self, c: CompletionRecord, attributes: genai.Attributes) -> None:
        """A span for the row's last request, within its chunk's."""
        chunk = next((span for span, first, end in list(self._chunks.values()) if first <= c.row < end), self._run)
        started_at = c.finished_at - c.latency_s
        span = self._tracer.start_span(
            f"chat {c.model}",
            trace.set_span_in_context(chunk),
            SpanKind.CLIENT,
            attributes | {"batchrun.row": c.row, "batchrun.status": str(c.status), "batchrun.attempts": c.attempts},
            start_time=int(started_at * 1e9),
        )
        if c.usage is not None:
            span.set_attribute("gen_ai.usage.input_tokens", c.usage.prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", c.usage.billed_output_tokens)
        if c.http_status is not None:
            span.set_attribute("http.response.status_code", c.http_status)
        if "error.type" in attributes:
            span.set_status(Status(StatusCode.ERROR))
        span.end(int(c.finished_at * 1e9))

    def _warn(self, why: str) -> None:
        note, self._note = self._note, None
        if note is not None:
            note(Notice(f"warning: OpenTelemetry: {why}; the run continues without", "telemetry", why=why))


_RUNS: "WeakKeyDictionary[metrics.MeterProvider, list[OpenTelemetry]]" = WeakKeyDictionary()
"""The runs at work by provider: a program's own provider outlives a run, and takes an instrument's callbacks once."""


def _observe(runs: "list[OpenTelemetry]", metric: Metric, options: CallbackOptions) -> Iterable[Observation]:
    return [observation for run in list(runs) for observation in run.observations(metric)]


class _Once(logging.Handler):
    """Passes the first warning of the SDK on, and keeps all of them off stderr."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._warn = warn

    def emit(self, record: logging.LogRecord) -> None:
        self._warn(_without_secrets(record.getMessage()))


def _without_secrets(text: str) -> str:
    """One line, without the values of the headers and the query that the environment sets for the collector."""
    for name, value in os.environ.items():
        if name.startswith("OTEL_EXPORTER_OTLP") and name.endswith("HEADERS"):
            for pair in value.split(","):
                if secret := pair.partition("=")[2].strip():
                    text = text.replace(secret, "…")
    text = re.sub(r"//[^/@\s]*@", "//", re.sub(r"\?\S*", "", text))
    return " ".join(text.split())[:MOST_WORDS]


def _resource() -> Resource:
    """The name that the environment gives this process; else `batchrun`."""
    resource = Resource.create({SERVICE_INSTANCE_ID: str(uuid.uuid4())})
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "batchrun", SERVICE_VERSION: __version__}))
    return resource
