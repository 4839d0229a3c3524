"""The cap on requests in flight, step by step: when it is tried, kept, raised, lowered and dropped."""

import pytest

from batchrun.limits.crowding import (
    BELOW_REFUSED,
    LEAST_ACCEPTED,
    LOWERED_AGAIN_S,
    MAX_PROBE_EVERY_S,
    PROBE_EVERY_S,
    RECENT_S,
    RULED_OUT_FOR_S,
    TEST_EVERY_S,
    TEST_FOR_S,
    TESTS,
    TRIED,
    Crowding,
)

MOST = 64
ORDINARY = 0.0
START_S = 100.0


class Story:
    """A crowding, and a clock moved by hand."""

    def __init__(self) -> None:
        self.crowding = Crowding(lambda why: None)
        self.now_s = START_S

    def cap(self) -> int:
        """The cap; 0 without one."""
        return self.crowding.cap or 0

    def accept(self, others: int, times: int = 1, *, sent_s: float | None = None, most: int = MOST) -> bool:
        """Attempts are accepted with so many others in flight; True if one of them shows that there is no crowd."""
        sent_s = self.now_s if sent_s is None else sent_s
        shown = [self.crowding.accepted(self.now_s, sent_s, others, most, ORDINARY) for _ in range(times)]
        return any(shown)

    def refuse(self, others: int, times: int = 1, *, sent_s: float | None = None) -> list[bool]:
        """Attempts are refused with so many others in flight; each True if the cap explains it."""
        sent_s = self.now_s if sent_s is None else sent_s
        return [self.crowding.refused(self.now_s, sent_s, others, ORDINARY) for _ in range(times)]

    def suspect(self, accepted: int = 10, refused: int = 20) -> bool:
        """Ten refusals came, all with more others in flight than the accepted attempts."""
        self.accept(accepted, 10)
        self.refuse(refused, 10)
        return self.crowding.suspect(self.now_s, 10)

    def keep(self) -> int:
        """The cap's trial ends well; returns the cap."""
        self.accept(self.cap() - 1, TRIED * self.cap())
        assert not self.crowding.on_trial
        return self.cap()


@pytest.fixture
def story() -> Story:
    return Story()


def test_a_crowd_is_capped_below_its_refusals(story: Story) -> None:
    assert story.suspect(accepted=10, refused=22)
    assert BELOW_REFUSED * 22 < story.cap() == 19 < 22
    assert story.crowding.on_trial


@pytest.mark.parametrize(("accepted", "starts"), [(LEAST_ACCEPTED - 1, False), (LEAST_ACCEPTED, True)])
def test_few_accepted_attempts_prove_no_crowd(story: Story, accepted: int, starts: bool) -> None:
    story.accept(1, accepted)
    story.refuse(20, 10)
    assert story.crowding.suspect(story.now_s, 10) is starts


def test_fewer_refusals_than_stated_prove_no_crowd(story: Story) -> None:
    story.accept(1, 10)
    story.refuse(20, 9)
    assert not story.crowding.suspect(story.now_s, 10)


@pytest.mark.parametrize(("crowded", "starts"), [(5, False), (3, True)])
def test_accepted_attempts_as_crowded_disprove_it(story: Story, crowded: int, starts: bool) -> None:
    """If half of ten had as many others in flight as the refused ones, the number is no cause; three may be late."""
    story.accept(1, 10 - crowded)
    story.accept(20, crowded)
    story.refuse(20, 10)
    assert story.crowding.suspect(story.now_s, 10) is starts


def test_accepted_attempts_of_long_ago_don_t_count(story: Story) -> None:
    story.accept(40, 10)
    story.now_s += RECENT_S
    assert story.suspect()


def test_one_other_in_flight_is_no_crowd(story: Story) -> None:
    story.accept(0, 10)
    story.refuse(1, 10)
    assert not story.crowding.suspect(story.now_s, 10)


def test_only_a_used_cap_passes_its_trial(story: Story) -> None:
    assert story.suspect()
    cap = story.cap()
    story.accept(cap // 2, 10 * cap)
    assert story.crowding.on_trial
    story.accept(cap - 1, TRIED * cap)
    assert not story.crowding.on_trial


def test_a_second_cap_is_tried_and_then_none(story: Story) -> None:
    assert story.suspect()
    first = story.cap()
    assert story.crowding.doubt(story.now_s)
    assert 0 < story.cap() < first
    assert not story.crowding.doubt(story.now_s)
    assert not story.cap()


def test_a_disproved_crowd_stays_ruled_out_longer(story: Story) -> None:
    for wait_s in (RULED_OUT_FOR_S, 2 * RULED_OUT_FOR_S):
        assert story.suspect()
        while story.crowding.doubt(story.now_s):
            pass
        story.now_s += wait_s - 1
        assert not story.suspect()
        story.now_s += 1


def test_a_used_cap_is_raised_by_growing_steps(story: Story) -> None:
    assert story.suspect()
    cap = story.keep()
    for step in (1, 2, 4):
        story.accept(cap - 1)
        assert story.cap() == cap, "too soon"
        story.now_s += PROBE_EVERY_S
        story.accept(cap - 2)
        assert story.cap() == cap, "not used"
        story.accept(cap - 1)
        cap += step
        assert story.cap() == cap


def test_a_cap_never_exceeds_the_most_in_flight(story: Story) -> None:
    assert story.suspect()
    cap = story.keep()
    for _ in range(4):
        story.now_s += PROBE_EVERY_S
        story.accept(story.cap() - 1, most=cap + 2)
    assert story.cap() == cap + 2


def test_a_refused_raise_is_undone_and_waits_longer(story: Story) -> None:
    assert story.suspect()
    cap, wait_s = story.keep(), PROBE_EVERY_S
    for _ in range(7):
        story.now_s += wait_s
        story.accept(cap - 1)
        assert story.cap() == cap + 1
        assert all(story.refuse(cap, 4)), "the cap explains them"
        assert story.cap() == cap
        wait_s = min(MAX_PROBE_EVERY_S, 2 * wait_s)
        story.now_s += wait_s - 0.5
        story.accept(cap - 1)
        assert story.cap() == cap, "too soon"
        story.now_s -= wait_s - 0.5
    assert wait_s == MAX_PROBE_EVERY_S


@pytest.mark.parametrize(("ordinary", "needed"), [(0.0, 1), (0.004, 2)])
def test_chance_alone_does_not_undo_a_raise(story: Story, ordinary: float, needed: int) -> None:
    assert story.suspect()
    cap = story.keep()
    story.now_s += PROBE_EVERY_S
    story.accept(cap - 1)
    refused = 0
    while story.cap() > cap and refused < 10:
        story.crowding.refused(story.now_s, story.now_s, cap, ordinary)
        refused += 1
    assert refused == needed


def test_refusals_below_a_kept_cap_are_not_explained(story: Story) -> None:
    assert story.suspect()
    cap = story.keep()
    assert story.refuse(cap - 1) == [False]
    assert story.refuse(cap) == [True]


def test_returning_refusals_lower_a_kept_cap_once(story: Story) -> None:
    """If they return at once, the number in flight is no cause."""
    assert story.suspect(refused=40)
    cap = story.keep()
    story.now_s += LOWERED_AGAIN_S + 1
    assert story.crowding.doubt(story.now_s)
    assert 0.8 * cap <= story.cap() < cap - 1
    story.now_s += LOWERED_AGAIN_S
    assert not story.crowding.doubt(story.now_s)
    assert not story.cap()


@pytest.mark.parametrize("refused", [2, 20])
def test_any_crowd_is_tested_for_a_second(story: Story, refused: int) -> None:
    assert story.suspect(accepted=0, refused=refused)
    times = []
    while (at_s := story.crowding.next_test_s(story.now_s)) is not None:
        if at_s == story.now_s:
            times.append(at_s - START_S)
        story.now_s = max(at_s, story.now_s + 0.001)
        assert story.now_s < START_S + 60
    assert times[0] == pytest.approx(TEST_EVERY_S)
    assert TEST_FOR_S - TEST_EVERY_S <= times[-1] <= TEST_FOR_S + 0.01
    assert len(times) == pytest.approx(TEST_FOR_S / TEST_EVERY_S, abs=1)


def test_tests_that_are_accepted_disprove_a_small_crowd(story: Story) -> None:
    """Only attempts that were sent later than the suspicion, with more others than were refused."""
    assert story.suspect(accepted=0, refused=2)
    story.now_s += 0.3
    assert not story.accept(3, 5, sent_s=START_S)
    assert not story.accept(2, 5)
    assert story.cap() == 2
    assert not story.accept(3, TESTS - 1)
    assert story.accept(3)
    assert not story.cap()
    assert not story.suspect(accepted=0, refused=2), "it is ruled out for a while"


def test_accepted_attempts_after_the_tests_disprove_nothing(story: Story) -> None:
    """A higher cap lets more through later on."""
    assert story.suspect()
    story.now_s += TEST_FOR_S + 0.1
    assert not story.accept(25, 2 * TESTS)
    assert story.cap()


def test_a_refused_test_ends_the_tests(story: Story) -> None:
    assert story.suspect(accepted=0, refused=2)
    story.now_s += 0.3
    assert story.refuse(3) == [True]
    assert story.crowding.next_test_s(story.now_s) is None
    assert story.cap() == 2


def test_a_refused_test_counts_as_a_trial(story: Story) -> None:
    """A higher cap is tried twice as late as without one: a crowd costs no more refusals for its test."""
    assert story.suspect()
    story.now_s += 0.3
    assert story.refuse(story.cap()) == [True]
    cap = story.keep()
    started_s = story.now_s
    while story.cap() == cap and story.now_s < started_s + 60:
        story.now_s += 0.1
        story.accept(cap - 1)
    assert PROBE_EVERY_S < story.now_s - started_s <= 2 * PROBE_EVERY_S + 0.2
