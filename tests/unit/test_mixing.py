"""Which kind of row is sent while new rows fail one after another."""

from batchrun.dispatch.mixing import FAILED_FIRST, FIRST_REACH, MOST_DOUBTED, Kind, Mixing
from batchrun.records import OK, Verdict

RETRY, AHEAD, NEXT = Kind.RETRY, Kind.AHEAD, Kind.NEXT


def failing() -> Mixing:
    """Rows 0, 1, 2 have failed at their first attempt."""
    mixing = Mixing()
    for row in range(FAILED_FIRST):
        assert not mixing.is_on
        mixing.ended(row, Verdict.FREE, is_new=True)
    assert mixing.is_on
    return mixing


def answered(kind: Kind) -> Mixing:
    """As `failing`, and row 900 of this kind was answered."""
    mixing = failing()
    mixing.taken(900, kind)
    assert mixing.ended(900, OK, is_new=False)
    assert mixing.answered is kind
    return mixing


def kinds(mixing: Mixing, *, may_wait: bool = True) -> list[Kind]:
    return list(mixing.kinds(may_wait=may_wait))


def test_an_answered_new_row_ends_the_mixing() -> None:
    """Rows come in order again, and the next search ahead starts where the first did."""
    mixing = failing()
    mixing.taken(100, AHEAD)
    mixing.ended(100, Verdict.FREE, is_new=True)
    assert mixing.reach > FIRST_REACH
    mixing.ended(3, OK, is_new=True)
    assert (mixing.is_on, mixing.reach, mixing.index(101)) == (False, FIRST_REACH, 100)


def test_an_older_row_does_not_end_the_mixing() -> None:
    """A slow answer to a row that was sent before the last failure says nothing about the rows after it."""
    mixing = failing()
    mixing.ended(1, OK, is_new=True)
    assert mixing.is_on
    mixing.taken(2, NEXT)
    mixing.ended(2, OK, is_new=True)
    assert mixing.is_on


def test_without_an_answered_kind_all_take_turns() -> None:
    mixing = failing()
    firsts = [next(mixing.kinds(may_wait=True)) for _ in range(4)]
    assert firsts == [RETRY, AHEAD, NEXT, RETRY]
    assert sorted(kinds(mixing), key=lambda kind: kind.value) == [RETRY, AHEAD, NEXT]


def test_few_rows_of_failing_kinds_are_sent() -> None:
    """`MOST_DOUBTED` between two answers, then only the kind that is answered."""
    mixing = answered(AHEAD)
    for row in range(MOST_DOUBTED):
        assert AHEAD not in kinds(mixing)[:-1]
        assert len(kinds(mixing)) == 3
        mixing.taken(row, NEXT)
    assert kinds(mixing) == [AHEAD]
    for row in range(MOST_DOUBTED):
        mixing.ended(row, Verdict.FREE, is_new=False)
    assert kinds(mixing) == [AHEAD], "what has failed since the last answer counts"
    mixing.ended(950, OK, is_new=False)
    assert len(kinds(mixing)) == 3


def test_a_returned_row_may_be_replaced() -> None:
    mixing = answered(AHEAD)
    for row in range(MOST_DOUBTED):
        mixing.taken(row, RETRY)
    mixing.taken(901, AHEAD)
    mixing.put_back(901)
    assert kinds(mixing) == [AHEAD], "a row of the answered kind was not counted"
    mixing.put_back(0)
    assert len(kinds(mixing)) == 3


def test_other_kinds_are_tried_without_a_wait() -> None:
    """Where the answered kind has no row and none is awaited, each kind is tried."""
    mixing = answered(RETRY)
    for row in range(MOST_DOUBTED):
        mixing.taken(row, NEXT)
    assert kinds(mixing) == [RETRY]
    assert set(kinds(mixing, may_wait=False)) == set(Kind)


def test_failures_of_unanswered_kinds_are_doubted() -> None:
    mixing = answered(AHEAD)
    mixing.taken(1, RETRY)
    mixing.taken(901, AHEAD)
    assert [mixing.is_doubted(row) for row in (1, 901, 77)] == [True, False, False]


def test_a_failing_answered_kind_is_forgotten() -> None:
    mixing = answered(AHEAD)
    for row in range(MOST_DOUBTED):
        mixing.taken(row, NEXT)
    mixing.taken(901, AHEAD)
    mixing.ended(901, Verdict.MAYBE, is_new=True)
    assert mixing.answered is None
    assert not mixing.is_doubted(0)
    mixing.taken(902, AHEAD)
    mixing.ended(902, OK, is_new=False)
    assert mixing.answered is AHEAD


def test_a_row_verdict_counts_as_an_answer() -> None:
    """An endpoint that refuses a row for its content is well."""
    mixing = failing()
    mixing.taken(5, RETRY)
    mixing.ended(5, Verdict.ROW, is_new=False)
    assert mixing.answered is RETRY
