"""The process: its commands, and a documented exit code in every case. Only this and `commands` import click.

Everything heavy is imported by the command that needs it: `batchrun --help` answers in a twentieth of a second.
"""

import errno
import os
import sys

import click

from batchrun import __version__, streams
from batchrun.commands import check, compare, merge, new, report, run, show, simulate, status, tune, verify
from batchrun.errors import BatchrunError, ExitCode, RunStoppedError
from batchrun.terminal import choose_format, is_json
from batchrun.terminal import error as error_line


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="batchrun")
def cli() -> None:
    """Send a file of prompts to a chat-completions API; get a Parquet file of answers and their cost."""


for command in (
    *(run.run, check.check, check.estimate, verify.export, tune.tune, verify.verify, new.new, simulate.simulate),
    *(status.status, show.show, status.watch, report.report, compare.compare, merge.merge),
):
    cli.add_command(command)


def main() -> None:
    """Runs the command line."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # gives memory back; must be set before pyarrow loads
    streams.open_all()
    choose_format(sys.argv[1:], os.environ)
    stdout = sys.stdout
    try:
        cli(standalone_mode=False)
        streams.write_result("")
    except SystemExit:
        if sys.stdout is not stdout:  # after a broken pipe click puts another in its place, and ends with 1
            streams.silence(sys.stdout)
            sys.exit(ExitCode.SIGPIPE)
        raise
    except streams.StdoutClosedError as closed:
        sys.exit(closed.exit_code)
    except BatchrunError as error:
        _end(f"Error: {error}", error.exit_code)
    except click.ClickException as error:
        if is_json():
            _end(f"Error: {error.format_message()}", ExitCode.USAGE)
        with streams.lenient_stderr():
            error.show()
        sys.exit(ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        _end("Stopped.", ExitCode.SIGINT)
    except Exception as error:
        if os.environ.get("BATCHRUN_TRACEBACK"):
            raise
        if (stopped := _interruption(error)) is not None:
            _end("Stopped.", stopped)
        _end(*_unexpected(error))


def _interruption(error: BaseException) -> ExitCode | None:
    """The exit code of the signal from which this error follows: in an import, Python and libraries raise others."""
    follows: BaseException | None = error
    while follows is not None:
        if isinstance(follows, RunStoppedError):
            return follows.exit_code
        if isinstance(follows, KeyboardInterrupt):
            return ExitCode.SIGINT
        follows = follows.__cause__ or follows.__context__
    return None


def _unexpected(error: Exception) -> tuple[str, ExitCode]:
    """The last line for an error that no code expected: the machine lacks something, or it is a bug."""
    from batchrun.durable import lacking

    try:
        streams.write_result("")
    except BatchrunError as refused:  # click printed its help, and the text is still in the buffer
        return f"Error: {refused}", refused.exit_code
    if (lack := lacking(error)) is not None:
        return f"Error: {lack}", ExitCode.PAUSED
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"Error: {error.filename}: {error.strerror}; choose another name", ExitCode.USAGE
    return (
        f"Internal error, a bug in batchrun: {type(error).__name__}: {error} "
        "(set BATCHRUN_TRACEBACK=1 for the traceback)",
        ExitCode.INTERNAL_ERROR,
    )


def _end(line: str, exit_code: ExitCode) -> None:
    error_line(line, int(exit_code))
    sys.exit(exit_code)
