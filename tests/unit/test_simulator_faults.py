"""Which request meets which fault: decided by seed, question and attempt, so that a rehearsal can be repeated."""

from hashlib import blake2b

from batchrun.simulator import Fault
from batchrun.simulator.faults import FaultBook

QUESTIONS = [blake2b(str(number).encode(), digest_size=16).digest() for number in range(2_000)]


def _fates(book: FaultBook, questions: list[bytes]) -> dict[bytes, bool]:
    return {
        question: book.fault_for(question, b"", ordinal=ordinal, age_s=0.0) is not None
        for ordinal, question in enumerate(questions, start=1)
    }


def _meets(book: FaultBook, *, ordinal: int = 1, age_s: float = 0.0, body: bytes = b"", question: int = 0) -> bool:
    return book.fault_for(QUESTIONS[question], body, ordinal=ordinal, age_s=age_s) is not None


def test_a_fault_has_its_share() -> None:
    faults = (Fault(kind="status", share=0.3),)
    forwards = _fates(FaultBook(faults, 7), QUESTIONS)
    backwards = _fates(FaultBook(faults, 7), QUESTIONS[::-1])
    assert forwards == backwards
    assert 0.26 < sum(forwards.values()) / len(QUESTIONS) < 0.34
    assert forwards != _fates(FaultBook(faults, 8), QUESTIONS)


def test_a_retry_meets_another_fate() -> None:
    """Unless the fault sticks to its request."""
    free, sticky = (FaultBook((Fault(kind="status", share=0.5, sticky=on),), 0) for on in (False, True))
    first, second = _fates(free, QUESTIONS), _fates(free, QUESTIONS)
    assert 0.4 < sum(first[question] == second[question] for question in QUESTIONS) / len(QUESTIONS) < 0.6
    assert _fates(sticky, QUESTIONS) == _fates(sticky, QUESTIONS)


def test_two_rules_draw_independently_of_each_other() -> None:
    rules = (Fault(kind="status", share=0.5), Fault(kind="cut", share=0.5))
    book = FaultBook(rules, 0)
    met = [book.fault_for(question, b"", ordinal=1, age_s=0.0) for question in QUESTIONS]
    assert 0.2 < sum(fault is rules[1] for fault in met) / len(met) < 0.3


def test_the_first_rule_that_applies_is_met() -> None:
    rules = (Fault(kind="status", match="never there"), Fault(kind="cut"), Fault(kind="hang"))
    assert FaultBook(rules, 0).fault_for(QUESTIONS[0], b"body", ordinal=1, age_s=0.0) is rules[1]


def test_a_script_holds_from_one_request_to_another() -> None:
    book = FaultBook((Fault(kind="status", from_request=3, times=2),), 0)
    assert [_meets(book, ordinal=ordinal) for ordinal in range(1, 6)] == [False, False, True, True, False]


def test_an_outage_has_a_beginning_and_an_end() -> None:
    book = FaultBook((Fault(kind="status", after_s=10, until_s=20),), 0)
    assert [_meets(book, age_s=age_s) for age_s in (0, 9.9, 10, 19.9, 20)] == [False, False, True, True, False]


def test_a_fault_matches_text_in_bodies() -> None:
    book = FaultBook((Fault(kind="status", match="poison"),), 0)
    assert _meets(book, body=b'{"a": "the poison row"}')
    assert not _meets(book, body=b'{"a": "a good row"}')


def test_times_count_over_all_or_for_each_question() -> None:
    over_all = FaultBook((Fault(kind="status", times=2),), 0)
    assert [_meets(over_all, question=index) for index in (0, 1, 2)] == [True, True, False]
    for_each = FaultBook((Fault(kind="status", times=1, per_question=True),), 0)
    assert [_meets(for_each, question=index) for index in (0, 1, 0, 1)] == [True, True, False, False]


def test_fates_by_attempt_survive_restarts() -> None:
    """A retry in a new process still meets another fate."""
    faults = (Fault(kind="status", share=0.5),)

    def fates(book: FaultBook, attempt: int) -> list[bool]:
        return [
            book.fault_for(question, b"", ordinal=1, age_s=0.0, attempt_of_row=f"{row}-{attempt}") is not None
            for row, question in enumerate(QUESTIONS)
        ]

    one_process = FaultBook(faults, 3)
    first, second = fates(one_process, 1), fates(one_process, 2)
    assert fates(FaultBook(faults, 3), 2) == second
    assert 900 < sum(a != b for a, b in zip(first, second, strict=True)) < 1_100


def test_a_sticky_fault_ignores_attempt_names() -> None:
    book = FaultBook((Fault(kind="status", share=0.5, sticky=True),), 0)
    named = [book.fault_for(QUESTIONS[0], b"", ordinal=1, age_s=0.0, attempt_of_row=f"0-{n}") for n in range(1, 20)]
    assert len(set(named)) == 1
