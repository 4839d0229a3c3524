"""Never lose a paid answer, never pay twice: killed at every marked point, judged by a harness that is judged too."""

import random
from collections import Counter
from pathlib import Path

import pytest

from tests import level
from tests.crash.bugs import BUGS
from tests.crash.campaign import Campaign
from tests.crash.points import FIRST_ROUND
from tests.crash.schedule import Kill, Plan, drawn, every_point
from tests.crash.trial import ROWS, Calm, calm_run, killed_retry, killed_run, killed_shards
from tests.crash.verdict import wrong_order

SEED = 20261122
RUNS = 8
FEW = 120
"""Rows of the sample's runs: eight chunks, so each point is passed often enough."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    return calm_run(tmp_path_factory.mktemp("calm"))


@pytest.mark.campaign
def test_no_answer_is_lost_at_any_marked_point(tmp_path: Path) -> None:
    """The process is killed there and resumed: nothing is lost or, without being named, paid for twice."""
    reported: list[str] = []
    calm = calm_run(tmp_path, level.amount(FEW, ROWS))
    plans = every_point(random.Random(SEED), RUNS, calm.took_s)
    campaign = Campaign(tmp_path, calm, plans, reported.append)
    campaign.run(deaths=1000, at_once=2)
    assert reported == []
    assert {death.place for death in campaign.deaths() if death.marked} == FIRST_ROUND.keys()
    assert len(campaign.outcomes) == RUNS


@pytest.mark.heavy
def test_no_answer_is_lost_in_killed_shards(tmp_path: Path, calm: Calm) -> None:
    """Three shards are killed and resumed; merged, they are one run that lost nothing and paid for nothing twice."""
    plans = drawn(random.Random(SEED), calm.took_s / 3, points_a_run=4)
    outcome = killed_shards(tmp_path / "run", [next(plans).kills for _ in range(3)], calm)
    assert outcome.violations == []
    assert len(outcome.deaths) >= 6


AGAIN = (
    "before the reopening is on record",
    "after the reopening is on record",
    "after the lost are named",
    "after the slot is taken",
    "between answer and put",
    "before COMMIT",
    "mid part",
    "before the part's rename",
    "between part and seal",
    "mid seal",
    "after the seal",
    "mid result",
    "before the result's rename",
    "after the result's rename",
    "between result and finished",
    "before a part is removed",
    "before the last summary",
)


@pytest.mark.heavy
def test_no_answer_is_lost_in_killed_retries(tmp_path: Path, calm: Calm) -> None:
    """Killed while failed rows are sent again: every answer stays, and nothing unnamed is paid for twice."""
    outcome = killed_retry(tmp_path / "run", [Kill(name) for name in AGAIN], calm)
    assert outcome.violations == []
    assert [death.place for death in outcome.deaths] == list(AGAIN)


@pytest.mark.heavy
@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", BUGS)
def test_the_harness_notices_each_bug(name: str, tmp_path: Path, calm: Calm) -> None:
    bug = BUGS[name]
    kills = () if bug.point is None else (Kill(bug.point, bug.passage),)
    outcome = killed_run(tmp_path / "run", Plan(kills, "file"), calm, bug=name)
    assert len(outcome.deaths) == len(kills), outcome.violations
    assert any(bug.noticed in violation for violation in outcome.violations), outcome.violations


def test_a_campaign_spreads_over_all_points() -> None:
    plans = drawn(random.Random(SEED), 3.0)
    points = Counter(kill.point for _ in range(len(FIRST_ROUND) * 4) for kill in next(plans).kills)
    random_moments = points.pop(None)
    assert points.keys() == FIRST_ROUND.keys()
    assert set(points.values()) <= {19, 20, 21}
    assert random_moments > 100


def test_calls_need_every_fsync_before_dependents() -> None:
    right = ["1\tfsync\t/p/x.tmp", "1\trename\t/p/x.tmp\t/p/x", "1\tfsync\t/p", "1\trecord\tthe seal"]
    assert list(wrong_order(right)) == []
    for missing in (0, 2):
        assert len(list(wrong_order(right[:missing] + right[missing + 1 :]))) == 1
    other_thread = ["2" + line[1:] if "fsync\t/p/x" in line else line for line in right]
    assert len(list(wrong_order(other_thread))) == 1
