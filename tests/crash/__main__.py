"""`python -m tests.crash KILLS --seed SEED`: exit code 1 when a promise was broken."""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.crash.campaign import Campaign, histogram
from tests.crash.schedule import drawn
from tests.crash.trial import calm_run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("kills", type=int, help="how many processes to kill")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, which is printed")
    parser.add_argument("--at-once", type=int, default=2, help="runs at the same time (default 2)")
    parser.add_argument("--folder", type=Path, help="where runs with violations stay (default: a new one)")
    requested = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if requested.seed is None else requested.seed
    folder = requested.folder or Path(tempfile.mkdtemp(prefix="crash-"))
    folder.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    calm = calm_run(folder)
    print(
        f"seed {seed}; an undisturbed run takes {calm.took_s:.1f} s; runs with violations stay in {folder}", flush=True
    )
    plans = drawn(random.Random(seed), calm.took_s)
    campaign = Campaign(folder, calm, plans, lambda line: print(line, flush=True))
    campaign.run(requested.kills, requested.at_once)
    deaths, broken = campaign.deaths(), campaign.violations()
    print(*histogram(deaths), sep="\n")
    runs, minutes = len(campaign.outcomes), (time.monotonic() - started_s) / 60
    print(f"seed {seed}: {len(deaths)} kills in {runs} runs, {minutes:.1f} minutes: {len(broken)} violations")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
