"""One request of each group goes first, and a group has as many keys as its pace needs."""

from hypothesis import given
from hypothesis import strategies as st

from batchrun.dispatch.cache_keys import KEY_REQUESTS_PER_MINUTE, MOST_PARKED, NO_KEY, WARM_S, CacheKeys, Key
from batchrun.simulator.prompt_cache import PromptCache, prompt_of
from batchrun.simulator.validate import parse_question


class Clock:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _body(group: str, row: int = 0) -> bytes:
    return f'{{"model":"m","messages":[{{"role":"system","content":"{group * 4_000}"}},{row}]}}'.encode()


def _take(keys: CacheKeys[int], group: str = "a", row: int = 0) -> Key | None:
    return keys.key_for(_body(group, row), may_wait=True)


def test_one_request_of_each_group_goes_first() -> None:
    keys = CacheKeys[int](Clock())
    first, other = _take(keys), _take(keys, "b")
    assert first is not None
    assert other is not None
    assert first.name != other.name
    assert _take(keys, row=1) is None
    assert keys.park(_body("a", 1), 1)
    assert keys.ended(first, answered=True) == [1]
    assert keys.parked == 0
    assert _take(keys, row=1) is first


def test_where_the_first_fails_another_goes_first() -> None:
    keys = CacheKeys[int](Clock())
    first = _take(keys)
    assert first is not None
    keys.park(_body("a", 1), 1)
    assert keys.ended(first, answered=False) == [1]
    second = _take(keys, row=1)
    assert second is not None
    assert second.leads
    assert _take(keys, row=2) is None


def test_a_full_key_gets_a_second_one() -> None:
    clock = Clock()
    keys = CacheKeys[int](clock)
    first = _take(keys)
    assert first is not None
    keys.ended(first, answered=True)
    same = [_take(keys, row=row) for row in range(1, KEY_REQUESTS_PER_MINUTE)]
    assert same == [first] * (KEY_REQUESTS_PER_MINUTE - 1)
    second = _take(keys, row=99)
    assert second is not None
    assert second.name != first.name
    clock.now_s += 60
    assert _take(keys, row=100) is first


def test_a_cold_prefix_is_filled_again() -> None:
    clock = Clock()
    keys = CacheKeys[int](clock)
    first = _take(keys)
    assert first is not None
    keys.ended(first, answered=True)
    clock.now_s += WARM_S
    again = _take(keys)
    assert again is first
    assert again.leads
    assert _take(keys, row=1) is None


def test_a_short_prompt_has_no_key() -> None:
    keys = CacheKeys[int](Clock())
    assert keys.key_for(b'{"messages":[]}', may_wait=True) is NO_KEY
    assert keys.ended(NO_KEY, answered=True) == []


def test_a_probe_is_never_parked() -> None:
    keys = CacheKeys[int](Clock())
    _take(keys)
    assert keys.key_for(_body("a"), may_wait=False) is not None
    assert all(keys.park(_body("a"), row) for row in range(MOST_PARKED))
    assert not keys.park(_body("a"), -1)


@given(
    rows=st.lists(st.sampled_from("abc"), max_size=60),
    steps=st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0, 90)), max_size=120),
)
def test_no_parked_row_is_lost(rows: list[str], steps: list[tuple[bool, bool, float]]) -> None:
    clock = Clock()
    keys = CacheKeys[int](clock)
    waiting, flying, ended = list(enumerate(rows)), list[tuple[int, Key]](), set[int]()

    def send() -> None:
        row, group = waiting.pop(0)
        if (key := _take(keys, group, row)) is None:
            assert flying, "a row may wait only for one that is in flight"
            keys.park(_body(group, row), row)
        else:
            flying.append((row, key))

    def end(*, answered: bool) -> None:
        row, key = flying.pop(0)
        ended.add(row)
        waiting.extend((released, rows[released]) for released in keys.ended(key, answered=answered))

    for sends, answered, pause_s in steps:
        clock.now_s += pause_s
        if sends and waiting:
            send()
        elif flying:
            end(answered=answered)
    while waiting or flying:
        send() if waiting else end(answered=False)
    assert ended == set(range(len(rows)))
    assert keys.parked == 0


def test_nearly_all_hit_at_600_a_minute() -> None:
    clock = Clock()
    keys, cache = CacheKeys[int](clock), PromptCache(300, 0)
    hits, flying, parked = 0, list[tuple[float, Key]](), 0
    for row in range(3_000):
        clock.now_s += 0.1
        while flying and flying[0][0] <= clock.now_s:
            parked -= len(keys.ended(flying.pop(0)[1], answered=True))
        messages = [{"role": "system", "content": "a" * 8_000}, {"role": "user", "content": str(row)}]
        key = _take(keys, row=row)
        if key is None:
            parked += keys.park(_body("a", row), row)
            continue
        request = parse_question({"model": "m", "messages": messages, "prompt_cache_key": key.name}).request
        prompt = prompt_of(request)
        machine = cache.machine(prompt, clock.now_s)
        hits += cache.look_up(prompt, machine, clock.now_s) > 0
        cache.keep(prompt, machine, clock.now_s)
        flying.append((clock.now_s + 2.0, key))
    assert hits > 0.95 * 2_800
