"""How much the tests try. `make test` runs a sample of large tables and campaigns; `make test-all` runs the rest, too.

`--level` is the only switch. All that is random in a test comes from one seed: each run prints it, `--seed` replays it.
"""

import random
from enum import StrEnum


class Level(StrEnum):
    """`REST` is all that `SAMPLE` leaves out, so that the two together are `FULL`."""

    SAMPLE = "sample"
    REST = "rest"
    FULL = "full"


HEAVY_SHARE = 1 / 6
"""The share of heavy tests in the sample: at a quarter they were a third of its work."""


class _Chosen:
    level = Level.FULL  # outside of pytest
    seed = 0


def choose(level: Level, seed: int) -> None:
    """Called once, by tests/conftest.py, before any test is collected."""
    _Chosen.level, _Chosen.seed = level, seed


def amount(sample: int, full: int) -> int:
    """How many examples, bits or kills a test marked `campaign` tries."""
    return sample if _Chosen.level is Level.SAMPLE else full


def seeded(name: str) -> random.Random:
    """A test's own source of randomness: with the same `--seed` it draws the same."""
    return random.Random(f"{_Chosen.seed} {name}")


def replay() -> str:
    """How to run a test again with the same random choices."""
    return f"replay with --level {_Chosen.level} --seed {_Chosen.seed}"
