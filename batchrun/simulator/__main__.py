"""`python -m batchrun.simulator '<JSON of SimulatorConfig>'`: one line with the URL, then serves until SIGTERM."""

import sys

from batchrun.errors import JobError
from batchrun.simulator.config import config_from_json
from batchrun.simulator.process import run


def main() -> int:
    """The exit code: 0 after a signal, 2 when the settings are wrong."""
    arguments = sys.argv[1:]
    try:
        config = config_from_json(arguments[0] if arguments else "{}")
        run(config, lambda url: print(f"listening on {url}", flush=True))
    except JobError as error:
        print(f"Error: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
