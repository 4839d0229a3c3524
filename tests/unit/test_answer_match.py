"""Questions find their answers by key, in flat memory."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchrun.startup import buckets
from batchrun.startup.answer_match import NONE, Questions, match

KEYS = st.integers(0, 5).map(lambda number: bytes([number]) * 16)
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def numbered(keys: list[bytes]) -> list[tuple[bytes, int]]:
    return [(key, row) for row, key in enumerate(keys)]


@SHARED
@given(st.lists(KEYS), st.lists(KEYS))
def test_the_kth_equal_question_gets_the_kth_answer(tmp_path: Path, old: list[bytes], new: list[bytes]) -> None:
    with match(numbered(old), numbered(new), len(new), tmp_path) as matches:
        found = list(matches)
    for key in {*old, *new}:
        answers = [row for row, other in enumerate(old) if other == key]
        questions = [row for row, other in enumerate(new) if other == key]
        wanted = answers[: len(questions)] + [NONE] * (len(questions) - len(answers))
        assert [found[row] for row in questions] == wanted
    assert max(Counter(row for row in found if row != NONE).values(), default=1) == 1


@pytest.mark.heavy
def test_many_rows_are_matched_over_several_buckets(tmp_path: Path) -> None:
    rows = buckets.ENTRIES_A_BUCKET + 10
    keys = [row.to_bytes(16, "little") for row in range(rows)]
    with match(numbered(keys), ((key, row) for row, key in enumerate(reversed(keys))), rows, tmp_path) as matches:
        assert matches[0] == rows - 1
        assert all(old == rows - 1 - new for new, old in enumerate(matches))
    assert list(tmp_path.iterdir()) == []


def test_rejected_records_are_no_rows(tmp_path: Path) -> None:
    with Questions(tmp_path) as questions:
        for ordinal in (0, 1, 3, 4, 6):  # 2 and 5 could not be read at all
            questions.add(ordinal, bytes([ordinal]) * 16)
        kept = list(questions.rows([1, 2, 5, 6]))
        assert list(questions.rows([2, 5])) == [(bytes([o]) * 16, row) for row, o in enumerate((0, 1, 3, 4, 6))]
        assert [row for _, row in questions.rows([5])] == [0, 1, 3, 4, 5]  # 2 is a row of which nothing is known
    assert kept == [(bytes([0]) * 16, 0), (bytes([3]) * 16, 1), (bytes([4]) * 16, 2)]
