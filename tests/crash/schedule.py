"""Which deaths a run is to die. PURE: seeded chance in, plans out."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.crash.points import FIRST_ROUND, Phase, Point

NEEDS_ONE_FILE = frozenset({"mid result", "before a part is removed"})
"""Points that are passed only where the parts become one file."""


@dataclass(frozen=True, slots=True)
class Kill:
    """A death that is planned: at a passage of a marked point, or `after_s` from when the product is loaded."""

    point: str | None = None
    passage: int = 1
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One run's deaths in order, each of a process that resumes what the last one left, and `output.layout`."""

    kills: tuple[Kill, ...]
    layout: str


def drawn(rng: random.Random, whole_run_s: float, points_a_run: int = 5) -> Iterator[Plan]:
    """Plans without end: the points dealt from a shuffled deck, each as often as any other, and random moments."""
    deck: list[Point] = []
    while True:
        if len(deck) < points_a_run:  # what is left goes first, and not twice into one run
            fresh = [point for point in FIRST_ROUND.values() if point not in deck]
            rng.shuffle(fresh)
            deck = [*rng.sample(deck, len(deck)), *fresh, *deck]
        dealt = {deck.pop().name for _ in range(points_a_run)}
        yield _plan(rng, dealt, [rng.uniform(0.0, 0.5) * whole_run_s for _ in range(rng.randint(1, 3))])


def every_point(rng: random.Random, runs: int, whole_run_s: float) -> Iterator[Plan]:
    """As many plans as `runs`: together they die at every marked point, and each once at a random moment."""
    names = list(FIRST_ROUND)
    for number in range(runs):
        mine = set(names[number::runs])
        moments = [rng.uniform(0.05, 0.4) * whole_run_s]
        yield _plan(rng, mine, moments, early=True)


def _plan(rng: random.Random, dealt: set[str], moments: list[float], *, early: bool = False) -> Plan:
    """Asking comes before finishing, or the run would be complete before its deaths; moments are in between."""
    points = [point for point in FIRST_ROUND.values() if point.name in dealt]
    kills = [Kill(point.name, 1 if early else _passage(rng, point)) for point in points]
    starting = sum(point.phase is Phase.STARTING for point in points)
    requested = sum(point.phase is not Phase.FINISHING for point in points)
    for moment_s in moments:
        kills.insert(requested if early else rng.randint(starting, requested), Kill(after_s=moment_s))
    one_file = dealt & NEEDS_ONE_FILE or rng.random() < 0.7
    return Plan(tuple(kills), "file" if one_file else "parts")


def _passage(rng: random.Random, point: Point) -> int:
    """Mostly early ones, so that several deaths fit into one run; a late one now and then."""
    return min(point.often, 1 + int(rng.expovariate(8 / point.often)))
