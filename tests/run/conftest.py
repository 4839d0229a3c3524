"""What several modules of this folder run against."""

from collections.abc import Iterator

import pytest

from tests.cli_process import KEY, KEY_ENV
from tests.s3_server import S3Server, environment, s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """A real S3 server. Runs of this process and of the command line find it, and their key, in the environment."""
    with s3_server() as server, environment({**server.environ, KEY_ENV: KEY}):
        yield server
