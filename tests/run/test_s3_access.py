"""How an S3 server is reached: over TLS with one's own authority, by a proxy, by the bucket's own host name."""

import http.server
import json
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from batchrun.errors import JobError, StorageError
from batchrun.storage.access import connect
from batchrun.storage.folder import folder_at
from batchrun.storage.urls import parse
from tests.fault_server import self_signed
from tests.s3_server import environ_for, environment


class Server:
    """A server that takes every request; `seen` are their targets with the host that was asked for, `keys` the ids of
    the keys that signed them. It also hands out credentials, each time others, which have expired when they arrive.
    """

    def __init__(self, certificate: Path | None = None) -> None:
        seen: list[tuple[str, str]] = []
        keys: list[str] = []
        handed_out: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                seen.append((self.path, self.headers["Host"].partition(":")[0]))
                keys.append(self.headers["Authorization"].partition("Credential=")[2].partition("/")[0])
                self.send_response_only(200)
                self.send_header("ETag", '"x"')
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                handed_out.append(f"AKIA{len(handed_out)}")
                now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                content = {"AccessKeyId": handed_out[-1], "SecretAccessKey": "s", "Token": "t", "Expiration": now}
                body = json.dumps(content).encode()
                self.send_response_only(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                return

        self.seen, self.keys, self.handed_out = seen, keys, handed_out
        self._served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._served.server_address[1]
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._served.socket = context.wrap_socket(self._served.socket, server_side=True)
        threading.Thread(target=self._served.serve_forever, args=[0.05], daemon=True).start()

    def close(self) -> None:
        self._served.shutdown()
        self._served.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def put(**more: str) -> None:
    with environment({**environ_for("http://127.0.0.1:9"), "AWS_MAX_ATTEMPTS": "1", **more}):
        folder_at("s3://data/team").put("a", b"x")


def test_a_server_with_its_own_authority(tmp_path: Path) -> None:
    certificate = self_signed(tmp_path)
    server = Server(certificate)
    to = {"AWS_ENDPOINT_URL": f"https://127.0.0.1:{server.port}"}
    with pytest.raises(StorageError, match="can't be written"):
        put(**to)
    put(**to, AWS_CA_BUNDLE=f"{certificate}.crt")
    server.close()
    assert server.seen == [("/data/team/a", "127.0.0.1")]
    with pytest.raises(JobError, match="AWS_CA_BUNDLE: /nowhere is not a file"):
        put(**to, AWS_CA_BUNDLE="/nowhere")


def test_a_proxy_that_the_environment_names(server: Server) -> None:
    to = {"AWS_ENDPOINT_URL": "http://store.invalid:9000", "http_proxy": f"127.0.0.1:{server.port}", "no_proxy": ""}
    put(**to)
    assert server.seen == [("http://store.invalid:9000/data/team/a", "store.invalid")]
    with pytest.raises(StorageError, match="can't be written"):  # there is no such host
        put(**{**to, "no_proxy": ".invalid"})
    assert len(server.seen) == 1


def test_a_bucket_by_its_own_host_name(server: Server, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("[default]\nregion = eu-west-1\ns3 =\n    addressing_style = virtual\n    max_queue_size = 10\n")
    proxied = {"http_proxy": f"http://127.0.0.1:{server.port}", "no_proxy": ""}  # which would find the host's address
    put(AWS_ENDPOINT_URL="http://store.invalid", AWS_CONFIG_FILE=str(config), **proxied)
    assert server.seen == [("http://data.store.invalid/team/a", "data.store.invalid")]


def test_a_loopback_server_needs_no_exception() -> None:
    proxied = {**environ_for("http://127.0.0.1:9"), "http_proxy": "http://127.0.0.1:8"}
    for endpoint, expected in (("http://127.0.0.1:9", False), ("http://store.invalid", True)):
        filesystem, _ = connect(parse("s3://data/x"), environ={**proxied, "AWS_ENDPOINT_URL": endpoint})
        assert ("'port': 8" in str(filesystem.__reduce__())) == expected


def test_credentials_that_expire_are_renewed(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of a container's role, in mid-run: each request is signed by the key that was handed out last."""
    to = environ_for(f"http://127.0.0.1:{server.port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
        del to[name]
    to |= {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"http://127.0.0.1:{server.port}/role", "HOME": str(tmp_path)}
    with environment(to):
        folder = folder_at("s3://data/team")
        for _ in range(3):
            folder.put("a", b"x")
            assert server.keys[-1] == server.handed_out[-1]
    assert len(set(server.keys)) == 3
