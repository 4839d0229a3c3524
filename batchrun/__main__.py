"""The program's first lines: while the command line is loaded, Ctrl-C ends the process without a traceback."""

import signal


def main() -> None:
    """Runs the command line. Before and after it a SIGINT has its default effect, unless our parent ignores it."""
    interrupt = signal.getsignal(signal.SIGINT)
    is_heard = interrupt is signal.default_int_handler
    if is_heard:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from batchrun.cli import main as command_line

    if is_heard:
        signal.signal(signal.SIGINT, interrupt)
    try:
        command_line()
    finally:
        if is_heard:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
