"""A collector for tests: takes OTLP over HTTP on loopback and decodes it, in a thread of this process."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Received:
    """What arrived. `raw` are the bodies; `spans` and `points` are of all of them, `points` of the last export."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.raw: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.resources: list[dict[str, Any]] = []
        self.spans: list[Any] = []
        self.metrics: dict[str, Any] = {}

    def take(self, path: str, body: bytes) -> None:
        if path.endswith("/metrics"):
            metrics = ExportMetricsServiceRequest.FromString(body)
            for resource in metrics.resource_metrics:
                self.resources.append(attributes(resource.resource))
                self.metrics = {each.name: each for scope in resource.scope_metrics for each in scope.metrics}
        else:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resources.append(attributes(resource.resource))
                self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def points(self, name: str) -> list[tuple[dict[str, Any], Any]]:
        """The points of a metric with their attributes."""
        data = self.metrics[name]
        return [(attributes(point), point) for point in getattr(data, data.WhichOneof("data")).data_points]

    def value(self, name: str, **wanted: str) -> float | None:
        """The sum of the numbers with these attributes; None without one."""
        numbers = [
            getattr(point, point.WhichOneof("value"))
            for has, point in (self.points(name) if name in self.metrics else [])
            if wanted.items() <= has.items()
        ]
        return sum(numbers) if numbers else None


def attributes(of: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}


@contextmanager
def receiving() -> Iterator[Received]:
    """A collector that listens until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
            received.raw.append(body)
            received.headers.append({name.lower(): value for name, value in self.headers.items()})
            received.take(self.path, body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        received = Received(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            yield received
        finally:
            server.shutdown()
            thread.join()
