"""Standard streams closed, full, broken or in another encoding: commands end as documented, and nothing is lost."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from batchrun.errors import ExitCode
from batchrun.simulator import SimulatorConfig
from tests.cli_process import KEY, KEY_ENV, Ended, batchrun, finish, start, write_job, write_rows
from tests.simulator_process import running_simulator

ROWS = 5

REFUSED = {"tune": ExitCode.USAGE, "run of no job": ExitCode.USAGE, "run of nothing": ExitCode.USAGE}
"""Commands that end so whatever becomes of their words."""

SPEAKING = ("run", "run of no job", "status", "report", "new")
"""A command for each way to write: a summary, an error, a page, a table, a file."""

TROUBLE = ("Traceback", "Internal error", "Exception ignored", "Error in")


class Place:
    """A folder with a job, and a complete run of it elsewhere."""

    def __init__(self, folder: Path, url: str, done: Path | None = None) -> None:
        self.folder, self.job, self.done = folder, folder / "job.toml", done or folder / "done"
        write_job(self.job, url, write_rows(folder / "in.jsonl", ROWS))
        self.job.write_text('name = "Käse"\n' + self.job.read_text("utf-8"), "utf-8")

    def commands(self, *names: str) -> Mapping[str, tuple[str | Path, ...]]:
        """These commands, or all. `run` and `new` write below the folder."""
        commands: dict[str, tuple[str | Path, ...]] = {
            "run": ("run", self.job, "-o", self.folder / "out"),
            "run of no job": ("run", self.folder / "no such job.toml"),
            "run of nothing": ("run",),
            "check": ("check", self.job),
            "estimate": ("estimate", self.job),
            "status": ("status", self.done),
            "report": ("report", self.done, "--format", "csv"),
            "verify": ("verify", self.done),
            "tune": ("tune", self.done, "--rpm", "5"),
            "new": ("new", self.folder / "new.toml"),
            "help": ("--help",),
            "version": ("--version",),
        }
        return {name: commands[name] for name in names or commands}

    def require_nothing_lost(self) -> None:
        assert (self.folder / "out" / "completions.parquet").exists()
        assert batchrun("verify", self.folder / "out").exit_code == 0
        assert batchrun("check", self.folder / "new.toml").exit_code == ExitCode.USAGE  # its input is not there
        assert "[request]" in (self.folder / "new.toml").read_text("utf-8")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A simulator's address, and a complete run against it."""
    with running_simulator(SimulatorConfig(latency_s=0)) as simulator:
        place = Place(tmp_path_factory.mktemp("first"), simulator.url)
        assert batchrun("run", place.job, "-o", place.done).exit_code == 0
        yield simulator.url, place.done


@pytest.fixture
def place(tmp_path: Path, first: tuple[str, Path]) -> Place:
    return Place(tmp_path, *first)


@contextmanager
def broken_pipe() -> Iterator[int]:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        yield writing
    finally:
        os.close(writing)


@contextmanager
def full_disk() -> Iterator[int]:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def usual(name: str) -> ExitCode:
    return REFUSED.get(name, ExitCode.COMPLETE)


def require_calm(name: str, ended: Ended) -> None:
    """No more than the lines that such a command has for people."""
    assert not [word for word in TROUBLE if word in ended.stderr + ended.stdout], (name, ended)


@pytest.mark.heavy
@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("closing", "names"),
    [
        ("<&-", ("run", "new", "status")),  # no command but `run -i -` reads it
        (">&-", ()),
        ("2>&-", ()),
        ("<&- >&- 2>&-", ("run", "run of nothing", "new", "verify")),
    ],
)
def test_every_command_works_with_a_closed_stream(place: Place, closing: str, names: tuple[str, ...]) -> None:
    """Each that it can make a difference to."""
    for name, arguments in place.commands(*names).items():
        ended = batchrun(*arguments, before=["sh", "-c", f'exec "$@" {closing}', "sh"])
        assert (name, ended.exit_code) == (name, usual(name)), ended
        require_calm(name, ended)
        assert ended.stdout or ">&-" in closing or usual(name), name
    place.require_nothing_lost()


@pytest.mark.heavy
@pytest.mark.sampled(1)
@pytest.mark.parametrize(("state", "code"), [(full_disk, ExitCode.PAUSED), (broken_pipe, ExitCode.SIGPIPE)])
def test_an_unwritable_result_has_its_exit_code(place: Place, state: object, code: int) -> None:
    assert callable(state)
    for name, arguments in place.commands().items():
        with state() as stdout:
            ended = batchrun(*arguments, stdout=stdout)
        assert (name, ended.exit_code) == (name, REFUSED.get(name, code)), ended
        require_calm(name, ended)
        if code == ExitCode.PAUSED and name not in REFUSED:
            assert "Error: standard output can't be written: No space left on device" in ended.stderr, name
    place.require_nothing_lost()


@pytest.mark.heavy
@pytest.mark.sampled(1)
@pytest.mark.parametrize("state", [full_disk, broken_pipe])
def test_an_unwritable_message_changes_nothing(place: Place, state: object) -> None:
    assert callable(state)
    for name, arguments in place.commands().items():
        with state() as stderr:
            ended = batchrun(*arguments, stderr=stderr)
        assert (name, ended.exit_code) == (name, usual(name)), ended
        require_calm(name, ended)
    place.require_nothing_lost()


@pytest.mark.heavy
@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ((), SPEAKING),
        (("LC_ALL=C", "LANG=C", "PYTHONCOERCECLOCALE=0", "PYTHONUTF8=0"), ()),
        (("PYTHONIOENCODING=ascii:strict", "LC_ALL=POSIX"), SPEAKING),
        (("PYTHONIOENCODING=utf-16",), SPEAKING),
        (("HOME=/nonexistent", "TMPDIR=/nonexistent", "TZ=nonsense", "COLUMNS=0", "TERM=dumb"), ()),
    ],
)
def test_every_command_works_in_an_odd_environment(
    place: Place, environ: tuple[str, ...], names: tuple[str, ...]
) -> None:
    """`env -i`: nothing but what is listed, not even PATH and HOME."""
    for name, arguments in place.commands(*names).items():
        before = ["env", "-i", f"{KEY_ENV}={KEY}", *environ]
        process = start(*arguments, before=before, errors="replace")
        ended = finish(process)
        assert (name, ended.exit_code) == (name, usual(name)), ended
        require_calm(name, ended)
    place.require_nothing_lost()


@pytest.mark.heavy
def test_missing_or_unreadable_stdin_is_named(place: Place) -> None:
    run = ("run", place.job, "-i", "-", "-o", place.folder / "out")
    closed = batchrun(*run, before=["sh", "-c", 'exec "$@" <&-', "sh"])
    assert closed.exit_code == ExitCode.USAGE
    assert "standard input is a terminal, or closed; pipe JSON lines into it" in closed.stderr
    with full_disk() as unreadable:
        ended = batchrun(*run, stdin=unreadable)
    assert ended.exit_code == ExitCode.USAGE
    assert "standard input can't be read: Bad file descriptor; name a file with -i" in ended.stderr


def test_a_simulator_with_closed_streams_serves_and_ends(tmp_path: Path) -> None:
    """libuv aborts on a descriptor of its own below 3."""
    code = "from batchrun.cli import main; main()"
    command = ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", sys.executable, "-c", code, "simulate"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening on ")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode in (0, 130)
    assert "Assertion" not in stderr


@pytest.mark.parametrize(
    ("module", "arguments", "returncode", "said"),
    [
        ("click", ["--help"], -signal.SIGINT, ""),
        ("asyncio", ["run", "job.toml"], ExitCode.SIGINT, "Stopped.\n"),
    ],
    ids=["before the command line is loaded", "while a command is loaded"],
)
def test_an_interrupt_while_modules_load_is_no_error(
    tmp_path: Path, module: str, arguments: list[str], returncode: int, said: str
) -> None:
    """Python turns some interrupts of an import into other errors."""
    Place(tmp_path, "http://127.0.0.1:9/v1")
    code = """
import os, signal, sys
module = sys.argv.pop(1)
class Interrupts:
    def find_spec(self, name, path, target=None):
        if name == module:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException as interrupt:
                raise RuntimeError("half loaded") from interrupt
sys.meta_path.insert(0, Interrupts())
from batchrun.__main__ import main
main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, module, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    assert (ended.returncode, ended.stderr) == (returncode, said)
