"""The levels of the tests (tests/level.py), their seed, and what holds for all of them."""

import contextlib
import gc
import random
import signal
from collections.abc import Callable, Generator, Iterator
from itertools import groupby
from typing import Any

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

from tests import level
from tests.level import Level
from tests.ray_cluster import OWN, RayCluster, ray_cluster

KILLS_NODES = ("crash", "test_ray.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("batchrun", "levels of the tests (tests/level.py)")
    group.addoption("--level", choices=[*Level], default=Level.FULL, help="sample, the rest of it, or both")
    group.addoption("--seed", type=int, help="replays the random choices of the run that printed this seed")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        drawn = getattr(config, "workerinput", {}).get("seed")  # in a process of xdist: what the first process drew
        config.option.seed = random.SystemRandom().randrange(10**6) if drawn is None else drawn
    level.choose(Level(config.option.level), config.option.seed)
    config.addinivalue_line("markers", "sampled(count): the sample has that many of the function's cases")
    config.addinivalue_line("markers", "campaign: tries less in the sample, by level.amount")
    config.addinivalue_line("markers", "heavy: takes seconds; the sample has a sixth of these, chosen by the seed")
    # how long an example takes shows how busy the machine is, and nothing about the product
    calm = [HealthCheck.too_slow]
    settings.register_profile("full", deadline=None, suppress_health_check=calm)
    settings.register_profile("sample", deadline=None, suppress_health_check=calm, max_examples=20)
    settings.load_profile("sample" if config.option.level == Level.SAMPLE else "full")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts its background jobs like that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = config.option.seed


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """xdist: all processes choose the same sample."""
    node.workerinput["seed"] = node.config.option.seed


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is collected stays until the end: to look through it for garbage took a third of the collection, and a
    twentieth of the tests.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The sample, or all that it leaves out."""
    # each takes up to half a minute, and one process does them all, so that they share its cluster: first, so that it
    # is not left alone with them at the end, and those that kill nodes last
    items.sort(key=lambda item: (not item.path.stem.startswith("test_ray"), item.path.parts[-2:] == KILLS_NODES))
    if config.option.level == Level.FULL:
        return
    in_sample = config.option.level == Level.SAMPLE
    kept: list[pytest.Item] = []
    for name, group in groupby(list(items), key=lambda item: item.nodeid.partition("[")[0]):
        cases = list(group)
        if cases[0].get_closest_marker("heavy") and level.seeded(f"heavy {name}").random() > level.HEAVY_SHARE:
            kept += [] if in_sample else cases
            continue
        # what tries less in the sample is tried whole by the rest
        thinned = cases[0].get_closest_marker("campaign") or is_hypothesis_test(getattr(cases[0], "obj", None))
        if (mark := cases[0].get_closest_marker("sampled")) and (in_sample or not thinned):
            chosen = set(level.seeded(name).sample(range(len(cases)), min(mark.args[0], len(cases))))
            kept += [case for place, case in enumerate(cases) if (place in chosen) == in_sample]
        elif in_sample or thinned:
            kept += cases
    config.hook.pytest_deselected(items=[*{*items}.difference(kept)])
    items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(level.replay())


@pytest.fixture(scope="session")
def _clusters() -> Iterator[Callable[[int], RayCluster]]:
    """The cluster of this process with at least so many nodes beside its head. After the head was killed, another."""
    clusters: list[RayCluster] = []
    with contextlib.ExitStack() as until_the_end:

        def living(nodes: int) -> RayCluster:
            if not clusters or not clusters[-1].has_head:
                clusters.append(until_the_end.enter_context(ray_cluster()))
            while len(clusters[-1].raylets) < nodes:
                clusters[-1].add_node()
            return clusters[-1]

        yield living


@pytest.fixture
def cluster_of(_clusters: Callable[[int], RayCluster], monkeypatch: pytest.MonkeyPatch) -> Callable[[int], RayCluster]:
    """A Ray cluster with at least so many nodes for actors; what the test starts connects to it."""
    for name, value in OWN.items():
        monkeypatch.setenv(name, value)
    return _clusters
