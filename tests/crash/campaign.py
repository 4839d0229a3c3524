"""Many killed runs, a few at a time, with their outcomes on one page."""

import itertools
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.crash.points import POINTS
from tests.crash.schedule import Plan
from tests.crash.trial import Calm, Death, Outcome, killed_run


class Campaign:
    """Runs the plans until there are enough deaths or no more plans. `tell` gets each violation as it is found."""

    def __init__(self, folder: Path, calm: Calm, plans: Iterator[Plan], tell: Callable[[str], None]) -> None:
        self._folder = folder
        self._calm = calm
        self._plans = plans
        self._tell = tell
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self.outcomes: list[Outcome] = []

    def run(self, deaths: int, at_once: int) -> None:
        """Blocks until the end. An error of the harness itself is raised."""
        with ThreadPoolExecutor(at_once) as pool:
            for worker in [pool.submit(self._work, deaths) for _ in range(at_once)]:
                worker.result()

    def deaths(self) -> list[Death]:
        """All that were died."""
        return [death for outcome in self.outcomes for death in outcome.deaths]

    def violations(self) -> list[str]:
        """All that were found."""
        return [violation for outcome in self.outcomes for violation in outcome.violations]

    def _work(self, deaths: int) -> None:
        while len(self.deaths()) < deaths:
            with self._lock:
                number, plan = next(self._numbers), next(self._plans, None)
            if plan is None:
                return
            folder = self._folder / f"run-{number:04d}"
            outcome = killed_run(folder, plan, self._calm)
            self.outcomes.append(outcome)
            if outcome.violations:
                self._tell("\n  ".join([f"{folder}: {plan}", *outcome.violations]))
            else:
                shutil.rmtree(folder)


def histogram(deaths: list[Death]) -> Iterator[str]:
    """How often death came at each marked point, and after which point the random ones came."""
    marked = Counter(death.place for death in deaths if death.marked)
    chance = Counter(death.place for death in deaths if not death.marked)
    yield f"{'place':<36}{'marked':>8}{'random, after it':>18}"
    for name in [*POINTS, *(chance.keys() - POINTS.keys())]:
        yield f"{name:<36}{marked[name]:>8}{chance[name]:>18}"
    yield f"{'together':<36}{marked.total():>8}{chance.total():>18}"
