"""A real S3 server (SeaweedFS) on loopback, and a proxy in front of it that does what goes wrong on the way."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

ADMIN = ("AKIAADMIN", "the-secret-of-the-admin")
READER = ("AKIAREADER", "the-secret-of-the-reader")
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
