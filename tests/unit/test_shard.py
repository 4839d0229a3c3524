"""Ranges of rows, and parts of limits, for every shard of a run: together they are the whole and nothing twice."""

import asyncio
import gzip
from bisect import bisect_right
from decimal import Decimal
from functools import partial
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from batchrun.errors import InputError, JobError
from batchrun.run_summary import Shard
from batchrun.source import START, open_source
from batchrun.startup import shard as shards
from tests.jobs import job_over, texts, write_lines
from tests.limited_server import Run, Server, new_gate, send_all
from tests.moved_clock import run_on_moved_clock

COUNTS = (1, 2, 3, 7, 16, 100)


def all_of(count: int) -> list[Shard]:
    return [Shard(number, count) for number in range(count)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("rows", [0, 1, 6, 7, 8, 99, 100, 101, 12_345])
def test_ranges_are_contiguous_and_nearly_equal(rows: int, count: int) -> None:
    ranges = [shards.rows_of(shard, rows) for shard in all_of(count)]
    assert [first for first, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == rows
    sizes = [end - first for first, end in ranges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("/16", "the variable before the slash is empty"),
        ("3", "expected K/N"),
        ("1/2/3", "expected K/N"),
        ("-1/4", "expected K/N"),
        ("a/4", "expected K/N"),
        ("4/4", "shards count from 0, so the last of 4 is 3/4"),
        ("0/0", "expected 1 to"),
        ("0/100001", "expected 1 to"),
        ("0/", "expected K/N"),
        ("٣/4", "expected K/N"),
    ],
)
def test_a_wrong_shard_is_one_line(text: str, says: str) -> None:
    with pytest.raises(JobError) as error:
        shards.parse(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_names_sort_in_the_order_of_shards() -> None:
    for count in COUNTS:
        suffixes = [shard.suffix for shard in all_of(count)]
        assert suffixes == sorted(suffixes)
    assert Shard(3, 16).suffix == ".shard-03-of-16"
    assert shards.parse("3/16") == Shard(3, 16)


# ── limits ────────────────────────────────────────────────────────────────────────────────────────────────────────────

LIMITS = {
    "requests_per_second": 2.5,
    "requests_per_minute": 617,
    "requests_per_day": 10_001,
    "tokens_per_minute": 200_003,
    "input_tokens_per_minute": 150_001,
    "output_tokens_per_minute": 50_001.9,
    "max_in_flight": 129,
}
BUDGET = {"max_cost_usd": Decimal("25.01"), "per_start_usd": Decimal("3.3333"), "max_tokens": 999, "max_requests": 333}


@pytest.mark.parametrize("count", COUNTS)
def test_parts_of_limits_never_exceed_the_whole(count: int) -> None:
    job = job_over("in.jsonl", limits=LIMITS, budget={**BUDGET, "per_day_usd": 100, "per_month_usd": 1000})
    own = [shards.job_of(job, shard) for shard in all_of(count)]
    for name, whole in LIMITS.items():
        parts = [getattr(each.limits, name) for each in own]
        assert sum(parts) == pytest.approx(int(whole) if name != "requests_per_second" else whole)
        assert parts == sorted(parts, reverse=True)
        assert {type(part) for part in parts} == {type(getattr(job.limits, name))}
        assert min(parts) > 0
    for name, amount in BUDGET.items():
        parts = [getattr(each.budget, name) for each in own]
        assert sum(parts) == amount
        assert max(parts) - min(parts) <= (Decimal("0.01") if isinstance(amount, Decimal) else 1)
    assert {each.budget.per_day_usd for each in own} == {100}  # shared by the budget's file
    for each, shard in zip(own, all_of(count), strict=True):
        msgspec.convert(msgspec.to_builtins(each), type(each))  # as valid as any job
        assert any("per_day" in line or "not divided" in line for line in shards.in_words(job, each, shard))


@pytest.mark.parametrize(
    ("table", "settings", "says"),
    [
        ("limits", {"requests_per_minute": 15}, "limits.requests_per_minute: 15.0 can't be divided by 16 shards"),
        ("limits", {"max_in_flight": 8}, "limits.max_in_flight: 8 can't be divided by 16 shards"),
        ("limits", {"requests_per_day": 3}, "limits.requests_per_day: 3 "),
        ("budget", {"max_cost_usd": Decimal("0.15")}, "budget.max_cost_usd: 0.15 can't be divided"),
        ("budget", {"max_requests": 2}, "budget.max_requests: 2 "),
    ],
)
@pytest.mark.parametrize("number", [0, 15])
def test_a_limit_too_small_to_divide_is_refused(
    table: str, settings: dict[str, object], says: str, number: int
) -> None:
    """By every shard."""
    job = job_over("in.jsonl", **{table: settings})
    with pytest.raises(JobError) as error:
        shards.job_of(job, Shard(number, 16))
    assert says in str(error.value)
    assert "limits_are" in str(error.value)
    limits = {**(settings if table == "limits" else {}), "limits_are": "per_process"}
    each = job_over("in.jsonl", limits=limits, **({} if table == "limits" else {table: settings}))
    own = shards.job_of(each, Shard(number, 16))
    assert (own.limits, own.budget) == (each.limits, each.budget)


def test_the_limits_of_several_endpoints_are_divided_each() -> None:
    from batchrun.job.load import from_tables

    tables = [{"url": f"https://h{n}.example/v1", "auth": "none", "requests_per_minute": 60 * n} for n in (1, 2)]
    job = from_tables({"endpoint": tables, "request": {"model": "m", "prompt": "p"}})
    own = [shards.job_of(job, shard) for shard in all_of(7)]
    for place, whole in enumerate((60, 120)):
        assert sum(each.endpoints[place].requests_per_minute or 0 for each in own) == whole
    assert "18 of 128 in flight" in " ".join(shards.in_words(job, own[6], Shard(6, 7)))


def test_the_directory_is_named_after_the_shard_once() -> None:
    job = job_over("in.jsonl", output={"path": "runs/{job}/{date}/"})
    first = shards.job_of(job, Shard(0, 3))
    assert first.output.path == "runs/{job}/{date}.shard-0-of-3"
    assert shards.job_of(first, Shard(0, 3)).output.path == first.output.path


# ── the input ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def inputs(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The same 2,345 rows in each format, over three files, one of them empty."""
    rows = texts(2345)
    table = pa.Table.from_pylist(rows)
    cuts = ((0, 1000), (1000, 1000), (1000, 2345))
    made: dict[str, tuple[Path, ...]] = {}
    for kind in ("jsonl", "jsonl.gz", "parquet", "csv"):
        paths = tuple(folder / f"{place}.{kind}" for place in range(3))
        for path, (first, end) in zip(paths, cuts, strict=True):
            if kind == "parquet":
                pq.write_table(table.slice(first, end - first), path, row_group_size=300)
            elif kind == "csv":
                pacsv.write_csv(table.slice(first, end - first), path)
            else:
                write_lines(path, rows[first:end])
                path.write_bytes(b"\n \n" + path.read_bytes().replace(b"\n", b"\r\n\n", 5))  # blank lines are no rows
                if kind.endswith("gz"):
                    path.write_bytes(gzip.compress(path.read_bytes()))
        made[kind] = paths
    return made


def test_shards_of_any_format_read_rows_once(tmp_path: Path) -> None:
    for kind, files in inputs(tmp_path).items():
        whole = open_source(files)
        records = list(whole.records())
        for count in (1, 3, 16):
            found: list[object] = []
            for shard in all_of(count):
                span = whole.find_span(partial(shards.rows_of, shard))
                assert span.records == 2345
                own = open_source(files, span=span)
                mine = list(own.records())
                assert [record.ordinal for record in mine] == list(range(*shards.rows_of(shard, 2345)))
                windows = list(own.windows(START, 97, 1 << 20))
                assert sum(window.rows for window in windows) == len(mine)
                if len(windows) > 2:  # from where any window ended
                    again = sum(w.rows for w in own.windows(windows[1].end, 10_000, 1 << 30))
                    assert again == len(mine) - windows[0].rows - windows[1].rows
                found += mine
            assert found == records, kind


def test_more_shards_than_rows_leave_some_without(tmp_path: Path) -> None:
    for rows, sizes in ((0, [0, 0, 0, 0]), (2, [1, 1, 0, 0])):
        files = (write_lines(tmp_path / f"{rows}.jsonl", texts(rows)),)
        own = [
            shards.find_input(job_over(files[0], input={"min_rows": 0}), files, shard, tmp_path) for shard in all_of(4)
        ]
        assert [len(list(each.source.records())) for each in own] == sizes


def test_every_shard_refuses_a_repeated_id(tmp_path: Path) -> None:
    """Wherever it repeats."""
    rows = texts(50)
    rows[40]["id"] = "r3"
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    pacsv.write_csv(table, tmp_path / "b.csv")
    for file in (tmp_path / "a.parquet", tmp_path / "b.csv", write_lines(tmp_path / "c.jsonl", rows)):
        job = job_over(file, input={"id": "id"})
        for shard in all_of(5):
            with pytest.raises(InputError, match="id: record 40 of the input, counted from 0, has the id of record 3;"):
                shards.find_input(job, (file,), shard, tmp_path)
            part = shards.find_input(job, (file,), shard, tmp_path, skip_invalid=True)
            assert part.span is not None
            assert part.span.records == 50
        part = shards.find_input(job_over(file), (file,), Shard(0, 5), tmp_path)
        assert part.span is not None
        assert part.span.records == 50


def test_a_parquet_shard_reads_its_row_groups(tmp_path: Path) -> None:
    """None of the other shards'."""
    path = tmp_path / "in.parquet"
    table = pa.Table.from_pylist(texts(1000))
    pq.write_table(table, path, row_group_size=100, use_dictionary=False)
    meta = pq.read_metadata(path)
    content = bytearray(path.read_bytes())
    for group in (0, 1, 5, 9):  # the rest of the file is unreadable
        chunk = meta.row_group(group).column(1)
        content[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = b"\xff" * (
            chunk.total_compressed_size
        )
    path.write_bytes(content)
    span = open_source((path,)).find_span(lambda n: (200, 500))
    assert [record.columns["id"] for record in open_source((path,), span=span).records()] == [
        f"r{number}" for number in range(200, 500)
    ]


def test_a_parquet_footer_says_that_a_file_changed(tmp_path: Path) -> None:
    from batchrun.source.parquet import footer_digest

    one, other = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pq.write_table(pa.Table.from_pylist(texts(100)), one)
    other.write_bytes(one.read_bytes())
    assert footer_digest(one) == footer_digest(other)
    pq.write_table(pa.Table.from_pylist(texts(100, first=1)), other)
    assert footer_digest(one) != footer_digest(other)


# ── together at one endpoint ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("rpm", "tpm", "count"), [(600, None, 7), (None, 30_000, 3), (617, 60_000, 16)])
def test_all_shards_together_keep_and_use_limits(rpm: int | None, tpm: int | None, count: int) -> None:
    given = {"requests_per_minute": rpm, "tokens_per_minute": tpm}
    limits = {name: limit for name, limit in given.items() if limit is not None}
    job = job_over("in.jsonl", limits=limits)
    rows, tokens = 1800, 100

    async def main() -> Server:
        server = Server(rpm, tpm, headers=tpm is not None)
        work = []
        for shard in all_of(count):
            own = shards.job_of(job, shard).limits
            first, end = shards.rows_of(shard, rows)
            run = Run(server)
            gate = new_gate(
                run,
                max_in_flight=own.max_in_flight,
                first_in_flight=min(8, own.max_in_flight),
                requests_per_minute=own.requests_per_minute,
                tokens_per_minute=own.tokens_per_minute,
            )
            work.append(send_all(run, gate, [tokens] * (end - first), workers=own.max_in_flight))
        await asyncio.gather(*work)
        return server

    server = run_on_moved_clock(main())
    assert server.refused() <= 0.025  # at the start all of them send at once, and this server allows two seconds' worth
    times = [exchange.at_s for exchange in server.accepted()]
    a_minute = min(limit for limit in (rpm, None if tpm is None else tpm / tokens) if limit is not None)
    most = max(bisect_right(times, at_s + 60) - place for place, at_s in enumerate(times))
    assert most <= a_minute * (1 + 1 / 60) + count  # each part may burst by a second, and by one request at least
    assert times[-1] - times[0] <= rows / a_minute * 60 * 1.05
