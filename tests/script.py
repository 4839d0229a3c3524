"""`python -m tests.script CODE ARGUMENTS…`: what `python -c` does, for a fork (`tests/prefork.py`)."""

import sys


def main() -> None:
    """Runs the code."""
    code = sys.argv.pop(1)
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
