"""Processes of the product that need not import it first: forks of a process that has.

Tests start some hundreds of runs and simulators, and half a second of imports was half of all their work. One process
beside each test process has everything loaded and only forks, so each fork is a fresh process of the product: killed,
signalled and waited for as any other. (The kernel hands it to the test process, as the nearest "subreaper", prctl(2).)
Where the start itself is under test (limits, strace) and off Linux, tests start an interpreter.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from batchrun.job.load import from_tables
from batchrun.price_list.lookup import listed

AVAILABLE = sys.platform == "linux"

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_ORDER_BYTES = 200_000

_ONE_AT_A_TIME = threading.Lock()

_LOADED = (
    *("batchrun.cli", "batchrun.api", "batchrun.simulated"),
    *("batchrun.commands.job_input", "batchrun.dispatch.dispatch"),
    *("batchrun.report.bill", "batchrun.report.closing", "batchrun.report.formats", "batchrun.report.progress"),
    *("batchrun.startup.cache_check", "batchrun.startup.estimate", "batchrun.startup.preview"),
    *("batchrun.report.resume_command", "batchrun.report.reprice", "batchrun.report.run_list"),
    *("batchrun.report.status", "batchrun.integrity.rebuild", "batchrun.integrity.salvage"),
    *("batchrun.integrity.verify", "batchrun.simulator.process", "batchrun.simulator.__main__", "tqdm", "uvloop"),
    *("jinja2.meta", "jinja2.sandbox", "multiprocessing.synchronize", "pyarrow.compute", "pyarrow.dataset"),
    *("click._textwrap", "encodings.idna", "encodings.utf_8_sig", "stringprep"),
    "tests.crash.launcher",
)


class Forked(subprocess.Popen[str]):
    """`python -m MODULE ARGUMENTS…` by a fork, for a module that has a `main()`. Takes Popen's pipes and `cwd`."""

    def __init__(self, module: str, arguments: Sequence[str], env: Mapping[str, str], **options: Any) -> None:
        self._order = {"module": module, "argv": [module, *arguments], "env": dict(env)}
        super().__init__([sys.executable, "-m", module, *arguments], text=True, **options)

    def _execute_child(self, *given: Any) -> None:
        """Popen's own method (CPython 3.11 to 3.14), with its pipes in hand: another process forks."""
        cwd, (child_in, to_child, from_child, child_out, errors_from_child, child_err) = given[5], given[10:16]
        standard = [own if fd == -1 else fd for own, fd in enumerate((child_in, child_out, child_err))]
        self.pid = _forked({**self._order, "cwd": str(cwd or Path.cwd())}, standard)
        self._child_created = True
        self._close_pipe_fds(child_in, to_child, from_child, child_out, errors_from_child, child_err)  # type: ignore[attr-defined]


def start(module: str, arguments: Sequence[str], env: Mapping[str, str], **options: Any) -> "subprocess.Popen[str]":
    """`python -m MODULE ARGUMENTS…`, by a fork where that is possible."""
    if AVAILABLE:
        return Forked(module, arguments, env, **options)
    code = f"import sys; from {module} import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=env, text=True, **options)


def script(code: str, *arguments: str | Path, **options: Any) -> "subprocess.Popen[str]":
    """`python -c CODE ARGUMENTS…`, its stdout a pipe, by a fork where that is possible."""
    words = [code, *map(str, arguments)]
    return start("tests.script", words, os.environ, stdout=subprocess.PIPE, **options)


@cache
def _server() -> socket.socket:
    """The connection to the process that forks; it ends with this one."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _ORDER_BYTES)
    command = [sys.executable, "-m", "tests.prefork", str(theirs.fileno())]
    with theirs:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    atexit.register(_end, ours, process)
    assert ours.recv(16) == b"loaded"
    return ours


def _end(server: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    server.close()
    process.wait()


def _forked(order: Mapping[str, object], standard: Sequence[int]) -> int:
    """The process id of the process that obeys the order, with these files as stdin, stdout and stderr."""
    with _ONE_AT_A_TIME:  # the campaign of kills starts processes from several threads; each gets its own answer
        server = _server()
        socket.send_fds(server, [json.dumps(order).encode()], list(standard))
        return int(server.recv(16))


def _serve(server: socket.socket) -> Callable[[], int | None]:
    """Forks for every order until the test process has gone; returns in each fork with what that is to do."""
    for name in _LOADED:
        importlib.import_module(name)
    _warm()
    threads = sorted(name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm"))
    # a fork keeps one thread only; jemalloc, which Arrow brings and does not use here, knows how to live with that
    assert [name for name in threads if name != "jemalloc_bg_thd"] == [Path("/proc/self/comm").read_text().strip()]
    gc.collect()
    gc.freeze()  # a collection in a fork would touch, and so copy, every page of what it shares
    server.send(b"loaded")
    while True:
        message, standard, _, _ = socket.recv_fds(server, _ORDER_BYTES, 3)
        if not message:
            os._exit(0)
        reading, writing = os.pipe()
        if not (between := os.fork()):
            if child := os.fork():
                os.write(writing, str(child).encode())
                os._exit(0)  # so that the child is handed on
            for descriptor in (server.detach(), reading, writing):
                os.close(descriptor)
            return _begin(json.loads(message), standard)
        os.waitpid(between, 0)  # only now may the child's pid be reported: before, no process could wait for it
        server.send(os.read(reading, 16))
        for descriptor in (*standard, reading, writing):
            os.close(descriptor)


def _warm() -> None:
    """What each run does first and Python keeps: the types of a job, the price list and its patterns, 50 ms."""
    url = "http://127.0.0.1/v1"
    job = from_tables({"endpoint": {"url": "simulator"}, "request": {"model": "vtrix-gpt-5.3-codex", "prompt": "Say"}})
    for model in (job.request.model, "unknown"):
        listed(str(model), "2026-11-01", url)


def _begin(order: Mapping[str, Any], standard: Sequence[int]) -> Callable[[], int | None]:
    """This process has the files, folder and environment of the order."""
    for own, descriptor in enumerate(standard):
        os.dup2(descriptor, own)
        os.close(descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  (the parent's may be one that seeks)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    time.tzset()  # of TZ, which the C library has read already
    if order["env"].get("PYTHONWARNINGS") == "error":
        warnings.simplefilter("error")
    sys.argv = order["argv"]
    main: Callable[[], int | None] = importlib.import_module(order["module"]).main
    return main


def _run(main: Callable[[], int | None]) -> NoReturn:
    """Runs it and exits as Python does, without the last step: freeing all modules would copy every shared page,
    55 ms a process. After an exception or with a broken stdout the interpreter exits by itself.
    """
    try:
        code: Any = main()
    except SystemExit as ended:
        code = ended.code
    if not isinstance(code, int | None):
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.exit(code)
    os._exit(int(code or 0))


if __name__ == "__main__":
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # as batchrun.cli.main does
    _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
