"""A run as OpenTelemetry sees it: over a collector's protocol, in a program's own SDK, and with no one listening."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchrun.job.load import load
from batchrun.simulator import SimulatorConfig, parse_faults
from batchrun.telemetry import genai
from batchrun.telemetry.metrics import METRICS
from batchrun.telemetry.otel import FLUSH_S
from tests.cli_process import KEY, KEY_ENV, batchrun, read_summary, write_job, write_rows
from tests.otlp_receiver import Received, attributes, receiving
from tests.simulator_process import RunningSimulator, running_simulator

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ROWS = 30


@pytest.fixture(scope="module")
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.02, faults=parse_faults("400=0.1"))) as running:
        yield running


def job(folder: Path, url: str, telemetry: str = "otel = true", rows: int = ROWS) -> Path:
    more = f"[telemetry]\n{telemetry}\n[output]\nchunk_rows = 10\nmax_failures = 30\n"
    return write_job(folder / "night.toml", url, write_rows(folder / "in.jsonl", rows), more)


class Observed(tuple[Received, dict[str, Any], Path]):
    """What a collector received of one run, the run's summary and its directory."""


@pytest.fixture(scope="module")
def observed(simulator: RunningSimulator, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """One run with a span for each request, in the trace of its caller."""
    folder = tmp_path_factory.mktemp("otel")
    with pytest.MonkeyPatch.context() as patch, receiving() as received:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.url)
        patch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=nights")
        patch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        patch.setenv("OTEL_SERVICE_NAME", "tickets")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        patch.setenv("TRACEPARENT", f"00-{TRACE}-{CALLER}-01")
        started = job(folder, simulator.url, "otel = true\nrequest_spans = 1.0")
        ended = batchrun("run", started, "-o", folder / "out")
        assert ended.exit_code == 0, ended.stderr
        assert "OpenTelemetry" not in ended.stderr
    return Observed((received, read_summary(folder / "out"), folder / "out"))


def test_the_figures_are_those_of_the_summary(observed: Observed) -> None:
    received, summary, _ = observed
    for status, rows in summary["by_status"].items():
        assert received.value("batchrun.rows", status=status) == rows
    assert received.value("batchrun.rows") == ROWS
    assert received.value("batchrun.tokens") == sum(line["total_tokens"] for line in summary["totals"])
    assert received.value("batchrun.cost_dollars") == pytest.approx(float(summary["cost_usd"]))
    assert received.value("batchrun.exit_code") == 0
    assert received.value("batchrun.run_state", state="complete") == 1
    assert set(received.metrics) <= {metric.name for metric in METRICS} | {genai.DURATION, genai.TOKEN_USAGE}
    assert {has["batchrun.job"] for name in received.metrics for has, _ in received.points(name)} == {"night"}
    tokens = received.metrics["batchrun.tokens"]
    assert (tokens.unit, tokens.sum.is_monotonic) == ("{token}", True)


def test_each_request_is_in_the_conventions_histograms(observed: Observed) -> None:
    received, summary, out = observed
    port = load(out.parent / "night.toml").endpoint.url.rpartition(":")[2].partition("/")[0]
    durations = received.points("gen_ai.client.operation.duration")
    assert sum(point.count for _, point in durations) == ROWS
    for has, point in durations:
        assert tuple(point.explicit_bounds) == pytest.approx([0.01 * 2**power for power in range(14)])
        assert has["gen_ai.operation.name"] == "chat"
        assert has["gen_ai.provider.name"] == "openai"
        assert has["gen_ai.request.model"] == "vtrix-gpt-5.3-codex"
        assert has["server.address"] == "127.0.0.1"
        assert has["server.port"] == int(port)
    failed = {has["error.type"]: point.count for has, point in durations if "error.type" in has}
    assert failed == {"400": summary["by_status"]["error"]}
    assert all("gen_ai.response.model" in has for has, _ in durations if "error.type" not in has)
    usage = received.points("gen_ai.client.token.usage")
    for kind, field in (("input", "prompt_tokens"), ("output", "completion_tokens")):
        points = [point for has, point in usage if has["gen_ai.token.type"] == kind]
        assert sum(point.sum for point in points) == sum(line[field] for line in summary["totals"])
        assert sum(point.count for point in points) == ROWS - summary["by_status"]["error"]
        assert tuple(points[0].explicit_bounds) == (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, *MANY)


MANY = 4194304, 16777216, 67108864


def test_a_run_joins_the_callers_trace(observed: Observed) -> None:
    received, summary, _ = observed
    assert {span.trace_id.hex() for span in received.spans} == {TRACE}
    (run,) = [span for span in received.spans if span.name == "batchrun.run"]
    assert run.parent_span_id.hex() == CALLER
    facts = {"batchrun.run_id": summary["run_id"], "batchrun.exit_code": 0, "batchrun.rows": ROWS}
    assert facts.items() <= attributes(run).items()
    assert run.status.code != 2
    chunks = {span.span_id: attributes(span) for span in received.spans if span.name == "batchrun.chunk"}
    assert sorted(has["batchrun.first_row"] for has in chunks.values()) == [0, 10, 20]
    assert {s.parent_span_id for s in received.spans if s.name == "batchrun.chunk"} == {run.span_id}
    requests = [span for span in received.spans if span.name == "chat vtrix-gpt-5.3-codex"]
    assert sorted(attributes(span)["batchrun.row"] for span in requests) == list(range(ROWS))
    for span in requests:
        has = attributes(span)
        chunk = chunks[span.parent_span_id]
        assert 0 <= has["batchrun.row"] - chunk["batchrun.first_row"] < 10
        assert span.kind == 3, "client"
        assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 60e9
        assert (span.status.code == 2) == ("error.type" in has) == (has["batchrun.status"] == "error")


def test_the_environment_says_who_sends_and_how(observed: Observed) -> None:
    received, _, _ = observed
    assert {each["service.name"] for each in received.resources} == {"tickets"}
    assert {each["deployment.environment.name"] for each in received.resources} == {"test"}
    assert {each["x-team"] for each in received.headers} == {"nights"}


def test_no_prompt_answer_or_key_leaves_the_machine(observed: Observed) -> None:
    received, _, out = observed
    text = b"".join(received.raw)
    assert b"item 1" not in text
    assert KEY.encode() not in text
    answers = batchrun("show", out, "-n", "1", "--json").stdout
    content = json.loads(answers.splitlines()[0])["content"]
    assert content
    assert content[:20].encode() not in text


def test_requests_have_no_spans_unless_asked_for(
    simulator: RunningSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as received:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.url)
        more = ("--set", "budget.max_requests=5", "--set", "request.stream=true")
        stopped = batchrun("run", job(tmp_path, simulator.url), "-o", tmp_path / "out", *more)
    assert stopped.exit_code == 4
    names = [span.name for span in received.spans]
    assert "batchrun.run" in names
    assert set(names) <= {"batchrun.run", "batchrun.chunk"}
    (run,) = [span for span in received.spans if span.name == "batchrun.run"]
    assert (run.status.code, attributes(run)["batchrun.exit_code"]) == (2, 4)
    assert attributes(run)["error.type"] == "exit 4"
    assert {each["service.name"] for each in received.resources} == {"batchrun"}
    first = [point.count for _, point in received.points("gen_ai.client.operation.time_to_first_chunk")]
    assert 0 < sum(first) <= 5, "of streams"


def test_a_refused_start_is_a_failed_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as received:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.url)
        refused = batchrun("run", job(tmp_path, "http://127.0.0.1:9"), "-o", tmp_path / "out", key="")
    assert refused.exit_code == 2
    (run,) = received.spans
    assert run.status.code == 2
    assert received.value("batchrun.exit_code") == 2


def test_the_sdk_can_be_disabled(simulator: RunningSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as received:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.url)
        monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
        assert batchrun("run", job(tmp_path, simulator.url), "-o", tmp_path / "out").exit_code == 0
    assert received.raw == []


@pytest.mark.sampled(1)
@pytest.mark.parametrize("collector", ["silent", "gone"])
def test_a_failing_collector_is_one_warning(
    simulator: RunningSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collector: str
) -> None:
    """And the run does not wait for it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        if collector == "gone":
            server.close()
            port = 9
        else:
            port = server.getsockname()[1]
        monkeypatch.setenv(
            "OTEL_EXPORTER_OTLP_ENDPOINT", f"http://user:hidden-word@127.0.0.1:{port}/x?token=hidden-word"
        )
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20hidden-word")
        began_s = time.monotonic()
        ended = batchrun("run", job(tmp_path, simulator.url), "-o", tmp_path / "out")
        took_s = time.monotonic() - began_s
    assert ended.exit_code == 0
    warnings = [line for line in ended.stderr.splitlines() if "OpenTelemetry" in line]
    assert len(warnings) == 1
    assert "hidden-word" not in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == 2, "the input's line, and this one"
    assert read_summary(tmp_path / "out")["elapsed_s"] < took_s < FLUSH_S + 30


def test_a_missing_extra_names_the_install_command(tmp_path: Path) -> None:
    file = job(tmp_path, "http://127.0.0.1:9")
    without = "import sys; sys.modules['opentelemetry'] = None; from batchrun.cli import main; main()"
    for command in (["run", file, "-o", tmp_path / "out"], ["check", file]):
        ended = subprocess.run([sys.executable, "-c", without, *map(str, command)], capture_output=True, text=True)
        assert ended.returncode == 2
        assert "telemetry.otel: opentelemetry is not installed; pip install 'batchrun[otel]'" in ended.stderr


def test_a_missing_exporter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    ended = batchrun("run", job(tmp_path, "http://127.0.0.1:9"), "-o", tmp_path / "out")
    assert ended.exit_code == 2
    assert "pip install opentelemetry-exporter-otlp-proto-grpc" in ended.stderr


def test_a_wrong_variable_stops_no_run(
    simulator: RunningSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "often")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert batchrun("run", job(tmp_path, simulator.url), "-o", tmp_path / "out").exit_code == 0


PROGRAM = """
import json, sys
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
import batchrun

reader, spans = InMemoryMetricReader(), InMemorySpanExporter()
metrics.set_meter_provider(MeterProvider([reader]))
tracing = TracerProvider()
tracing.add_span_processor(SimpleSpanProcessor(spans))
trace.set_tracer_provider(tracing)
seen = []

def watch(summary):
    if summary.state == "running" and not seen:
        data = json.loads(reader.get_metrics_data().to_json())
        seen.append([m["name"] for r in data["resource_metrics"] for s in r["scope_metrics"] for m in s["metrics"]])

for number in range(2):
    with trace.get_tracer("program").start_as_current_span("program"):
        batchrun.run(sys.argv[1], output=f"{sys.argv[2]}/{number}", progress=watch)
data = json.loads(reader.get_metrics_data().to_json())
scopes = [scope for resource in data["resource_metrics"] for scope in resource["scope_metrics"]]
observed = {metric["name"]: metric["data"]["data_points"] for scope in scopes for metric in scope["metrics"]}
ids = [[span.name, span.parent and span.parent.span_id, span.context.span_id] for span in spans.get_finished_spans()]
print(json.dumps({"seen": seen, "observed": observed, "spans": ids}))
"""


@pytest.mark.heavy
def test_a_program_gets_all_through_its_own_sdk(
    simulator: RunningSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(job(tmp_path, simulator.url)), str(tmp_path / "runs")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    observed = json.loads(ended.stdout)
    assert "batchrun.input_rows" in observed["seen"][0], "while a run works"
    assert "batchrun.input_rows" not in observed["observed"], "no run is at work"
    assert sum(point["count"] for point in observed["observed"][genai.DURATION]) == 2 * ROWS
    spans = observed["spans"]
    callers = [own for name, _, own in spans if name == "program"]
    assert [parent for name, parent, _ in spans if name == "batchrun.run"] == callers
    assert sum(name == "batchrun.chunk" for name, _, _ in spans) == 2 * 3
    assert ended.stderr == ""
