"""A real S3 server (SeaweedFS) on loopback, and a proxy in front of it that does what goes wrong on the way."""

import contextlib
import http.client
import http.server
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs

ADMIN = ("AKIAADMIN", "the-secret-of-the-admin")
READER = ("AKIAREADER", "the-secret-of-the-reader")
SCOPED = ("AKIASCOPED", "the-secret-of-a-team")
"""May do everything below `data/team/`, and nothing beside it."""

BUCKET = "data"


@dataclass(frozen=True)
class S3Server:
    """`url` is its endpoint. `environ` is what a process needs to use it, in the AWS tools' own names."""

    url: str

    @property
    def environ(self) -> dict[str, str]:
        return environ_for(self.url)

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The server as a test sees it, not through our own code."""
        key, secret = ADMIN
        return pafs.S3FileSystem(
            access_key=key,
            secret_key=secret,
            endpoint_override=self.url,
            region="us-east-1",
            allow_bucket_creation=True,
        )

    def put(self, path: str, content: bytes) -> None:
        """The object `path`, "bucket/name", has that content."""
        with self.filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(content)

    def read(self, path: str) -> bytes:
        """The object's content."""
        with self.filesystem.open_input_file(path) as stream:
            content: bytes = stream.read()
        return content

    def names(self, folder: str) -> list[str]:
        """All objects below the folder, relative to it, sorted."""
        selector = pafs.FileSelector(folder, recursive=True, allow_not_found=True)
        found = [each.path for each in self.filesystem.get_file_info(selector) if each.is_file]
        return sorted(path.removeprefix(f"{folder}/") for path in found)


def environ_for(url: str, credentials: tuple[str, str] = ADMIN) -> dict[str, str]:
    """The AWS tools' variables for the server at `url`."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": credentials[0],
        "AWS_SECRET_ACCESS_KEY": credentials[1],
        "AWS_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "2",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The variables are set for this process and those that it starts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """A running server with the bucket `data`; it takes about 3 s to start."""
    weed = Path(sys.executable).with_name("weed")
    with tempfile.TemporaryDirectory(prefix="s3-") as folder:
        identities = [
            _identity("admin", ADMIN, ["Admin", "Read", "Write", "List", "Tagging"]),
            _identity("reader", READER, ["Read", "List"]),
            _identity("scoped", SCOPED, [f"{action}:{BUCKET}/team/*" for action in ("Read", "Write", "List")]),
        ]
        config = Path(folder) / "s3.json"
        config.write_text(json.dumps({"identities": identities}))
        ports = dict(zip(("s3", "master", "volume", "filer"), _free_ports(4), strict=True))
        command = [str(weed), "-logdir", folder, "server", f"-dir={folder}", "-s3"]
        command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-{name}.port={port}" for name, port in ports.items()]
        command += [f"-s3.config={config}", "-s3.autoCreateBucket=false", "-volume.max=50"]
        command += ["-master.volumeSizeLimitMB=64", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            server = S3Server(f"http://127.0.0.1:{ports['s3']}")
            _wait_for(server, process)
            yield server
        finally:
            process.kill()
            process.wait()


def _identity(name: str, credentials: tuple[str, str], actions: list[str]) -> dict[str, object]:
    key, secret = credentials
    return {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}


def _free_ports(count: int) -> list[int]:
    """Ports whose gRPC neighbours, 10,000 higher, are free too."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            low = held.enter_context(socket.socket())
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1] % 20_000 + 12_000
            with contextlib.suppress(OSError):
                for each in (port, port + 10_000):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", each))
                ports.append(port)
    return ports


def _wait_for(server: S3Server, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, "the S3 server ended"
        assert time.monotonic() < deadline, "the S3 server does not answer"
        try:
            server.filesystem.create_dir(BUCKET)
            server.put(f"{BUCKET}/ready", b"")  # only with a volume server can it store anything
        except OSError:
            time.sleep(0.1)
        else:
            server.filesystem.delete_file(f"{BUCKET}/ready")
            return


Script = Callable[[str, str], str | None]
"""Method and path of a request → what goes wrong: "403", "412", "500", "503", "slow", "cut"; None: nothing."""

SLOW_S = 0.3


@dataclass
class Proxy:
    """`script` may be replaced while it works; `seen` are the requests that arrived, as "PUT /bucket/name"."""

    url: str
    script: Script
    seen: list[str] = field(default_factory=list)

    def count(self, pattern: str) -> int:
        """How many requests match so far."""
        return sum(re.search(pattern, each) is not None for each in self.seen)


def fails(pattern: str, fault: str, times: int = 1 << 30) -> Script:
    """A script by which the first so many requests that match end with that fault."""
    left = itertools.count(times, -1)

    def script(method: str, path: str) -> str | None:
        return fault if re.search(pattern, f"{method} {path}") and next(left) > 0 else None

    return script


@contextlib.contextmanager
def proxy_before(server: S3Server, script: Script = lambda method, path: None) -> Iterator[Proxy]:
    """A proxy before the server. Signatures hold, because the server takes the proxy's name for its own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle_one_request()

        def do_any(self) -> None:
            body = self._body()
            proxy.seen.append(f"{self.command} {self.path}")
            fault = proxy.script(self.command, self.path)
            if fault is not None and fault.isdigit():
                self._answer(int(fault), {}, f"<Error><Code>{_CODES[fault]}</Code></Error>".encode())
                return
            if fault == "slow":
                time.sleep(SLOW_S)
            upstream = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
            with contextlib.closing(upstream):
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() != "expect":  # answered here
                        upstream.putheader(name, value)
                upstream.endheaders(body)
                response = upstream.getresponse()
                content = response.read()
            headers = {name: value for name, value in response.getheaders() if name.lower() not in _HOP}
            if fault == "cut":
                self._answer(response.status, {**headers, "Content-Length": str(len(content) + 100)}, content)
                self.close_connection = True
                return
            self._answer(response.status, headers, content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_any

        def _body(self) -> bytes:
            """The request's body as it came, with the frames of its chunks."""
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            frames = b""
            while True:
                line = self.rfile.readline()
                size = int(line.partition(b";")[0], 16)
                frames += line + (self.rfile.read(size + 2) if size else b"")
                if not size:
                    while (trailer := self.rfile.readline()) != b"\r\n":
                        frames += trailer
                    return frames + b"\r\n"

        def _answer(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        served.daemon_threads = True
        proxy = Proxy(f"http://127.0.0.1:{served.server_address[1]}", script)
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            served.shutdown()
            thread.join()


_CODES = {"403": "AccessDenied", "412": "PreconditionFailed", "500": "InternalError", "503": "SlowDown"}
_HOP = frozenset({"connection", "transfer-encoding", "keep-alive"})
