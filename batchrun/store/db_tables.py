"""The checkpoint's tables, and the conversion between values and their records. PURE.

The last field of every record in a table is its CRC; records here are without it.
"""

import re
from decimal import Decimal

import msgspec

from batchrun.money import to_pico, to_usd
from batchrun.records import CompletionRecord, Discarded, PossiblyBilled, RowError, Usage, Verdict
from batchrun.run_summary import TotalsLine
from batchrun.store.database import Record

TABLES = """
CREATE TABLE manifest (name TEXT PRIMARY KEY, value TEXT, crc INTEGER) WITHOUT ROWID;
CREATE TABLE invocations (invocation INTEGER PRIMARY KEY, started_at REAL, pid INTEGER, host TEXT, version TEXT,
    crc INTEGER);
CREATE TABLE chunks (chunk INTEGER PRIMARY KEY, first_row INTEGER, rows INTEGER, end_position TEXT, input_digest TEXT,
    generation INTEGER, part_digest TEXT, open INTEGER, crc INTEGER);
CREATE TABLE rows (row INTEGER PRIMARY KEY, attempts INTEGER, completion BLOB, batch INTEGER, crc INTEGER);
CREATE TABLE originals (row INTEGER PRIMARY KEY, attempts INTEGER, completion BLOB, batch INTEGER, crc INTEGER);
CREATE TABLE counted (id INTEGER PRIMARY KEY, batch INTEGER, crc INTEGER);
CREATE TABLE attempts (row INTEGER, n INTEGER, verdict TEXT, counted INTEGER, http_status INTEGER, error_kind TEXT,
    message TEXT, request_id TEXT, at REAL, model TEXT, prompt_tokens INTEGER, completion_tokens INTEGER,
    total_tokens INTEGER, cached_tokens INTEGER, reasoning_tokens INTEGER, cache_write_tokens INTEGER,
    cache_write_1h_tokens INTEGER, cost_usd TEXT, said TEXT, invocation INTEGER, crc INTEGER,
    PRIMARY KEY (row, n, invocation)) WITHOUT ROWID;
CREATE TABLE possibly_billed (row INTEGER, n INTEGER, request_key TEXT, upper_bound_usd TEXT,
    upper_bound_tokens INTEGER, cause TEXT, invocation INTEGER, request_id TEXT, crc INTEGER);
CREATE TABLE totals (invocation INTEGER, model TEXT, status TEXT, day TEXT, service_tier TEXT, rows INTEGER,
    attempts INTEGER, prompt_tokens INTEGER, cached_tokens INTEGER, completion_tokens INTEGER,
    reasoning_tokens INTEGER, total_tokens INTEGER, cost_usd TEXT, unpriced INTEGER, without_usage INTEGER,
    offline_prompt_tokens INTEGER, offline_completion_tokens INTEGER, cache_write_tokens INTEGER,
    reported_cost_usd TEXT, reused INTEGER, duplicates INTEGER, saved_usd TEXT, crc INTEGER,
    PRIMARY KEY (invocation, model, status, day, service_tier)) WITHOUT ROWID;
CREATE TABLE replaced (invocation INTEGER, model TEXT, status TEXT, day TEXT, service_tier TEXT, rows INTEGER,
    attempts INTEGER, prompt_tokens INTEGER, cached_tokens INTEGER, completion_tokens INTEGER,
    reasoning_tokens INTEGER, total_tokens INTEGER, cost_usd TEXT, unpriced INTEGER, without_usage INTEGER,
    offline_prompt_tokens INTEGER, offline_completion_tokens INTEGER, cache_write_tokens INTEGER,
    reported_cost_usd TEXT, reused INTEGER, duplicates INTEGER, saved_usd TEXT, revision INTEGER, crc INTEGER,
    PRIMARY KEY (invocation, model, status, day, service_tier)) WITHOUT ROWID;
CREATE TABLE answered_as (model TEXT PRIMARY KEY, rows INTEGER, crc INTEGER) WITHOUT ROWID;
CREATE TABLE standing (status TEXT PRIMARY KEY, rows INTEGER, crc INTEGER) WITHOUT ROWID;
CREATE TABLE reopened (row INTEGER PRIMARY KEY, variant INTEGER, attempts INTEGER, status TEXT, cost_usd TEXT,
    answer TEXT, crc INTEGER);
"""


class Chunk(msgspec.Struct, frozen=True):
    """A window of consecutive rows. Rows in the database replace those of its base part, if it has one.

    `generation` is that of the base part, `chunk.g<generation>`; 0: there is none. An open chunk (1) has its input
    stored, and rows of it may be pending; a sealed one (0) consists of its part alone.
    """

    chunk: int
    first_row: int
    rows: int
    end_position: str
    input_digest: str
    generation: int = 0
    part_digest: str | None = None
    open: int = 1

    @property
    def end_row(self) -> int:
        """One past the last row."""
        return self.first_row + self.rows


class Reopened(msgspec.Struct, frozen=True):
    """A row of a base part that is sent again, with `variant` of the job. Its record in the base part is valid until
    the new one is durable.

    `status`, `attempts` and `cost_usd` (None: unknown) are those of the base part. `answer` is what its answer alone
    used and cost, as a line of the totals in JSON.
    """

    row: int
    variant: int
    attempts: int
    status: str
    cost_usd: str | None
    answer: str

    @property
    def line(self) -> TotalsLine:
        """What its answer alone used and cost, with the key of the line that it is booked in."""
        return msgspec.json.decode(self.answer, type=TotalsLine)


def pico_usd(text: str | None) -> int | None:
    """The amount that a table stores as text in USD."""
    return None if text is None else to_pico(Decimal(text))


_SURROGATE = re.compile("[\ud800-\udfff]")


def _characters(text: str | None) -> str | None:
    """Lone surrogates replaced by U+FFFD: headers and errors may have them (PEP 383), SQLite and Parquet can't."""
    return text if text is None or text.isascii() else _SURROGATE.sub("\ufffd", text)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(CompletionRecord).decode


def completion_record(c: CompletionRecord, batch: int) -> Record:
    """`batch` numbers the commits: rows of a later one than `counted` names are not in the stored totals yet."""
    # one blob: a column for each field costs three times as much to write (docs/benchmarks.md)
    try:
        blob = _encode(c)
    except UnicodeEncodeError:  # a lone surrogate, from a header or an error
        blob = _encode(_in_characters(c))
    return c.row, c.attempts, bytearray(blob), batch  # sqlite3 looks for an adapter of bytes, at the cost of the insert


def completion(record: Record) -> CompletionRecord:
    """The completion in a record of `rows` or `originals`."""
    return _decode(record[2])


def _in_characters(c: CompletionRecord) -> CompletionRecord:
    """The record with every text that comes from a server or an exception made storable."""
    error = c.error
    if error is not None:
        error = RowError(error.kind, error.http_status, _characters(error.code), _characters(error.message))
    return msgspec.structs.replace(
        c,
        error=error,
        request_id=_characters(c.request_id),
        answered_model=_characters(c.answered_model),
        set_aside=tuple(
            msgspec.structs.replace(each, message=_characters(each.message), content=_characters(each.content))
            for each in c.set_aside
        ),
    )


def discarded_record(d: Discarded, invocation: int) -> Record:
    """The record in `attempts`. The bounds are not in it: those of a possibly billed attempt are in that table."""
    u = d.usage
    usage = (None,) * len(Usage.__struct_fields__) if u is None else msgspec.structs.astuple(u)
    cost = None if d.cost_pico_usd is None else str(to_usd(d.cost_pico_usd))
    return (
        d.row, d.n, str(d.verdict), int(d.counted), d.http_status, d.error_kind, _characters(d.message),
        _characters(d.request_id), d.at, d.model, *usage, cost,
        _characters(d.said), invocation,
    )  # fmt: skip


def discarded(record: Record) -> Discarded:
    row, n, verdict, counted, http_status, kind, message, request_id, at, model, *rest = record
    *tokens, cost, said, _ = rest
    return Discarded(
        row=row, n=n, verdict=Verdict(verdict), counted=bool(counted), http_status=http_status, error_kind=kind,
        message=message, request_id=request_id, at=at, model=model,
        usage=None if tokens[0] is None else Usage(*tokens),
        cost_pico_usd=pico_usd(cost),
        possibly_billed_pico_usd=None, maybe_billed=False, key=b"", said=said,
    )  # fmt: skip


def possibly_billed_record(p: PossiblyBilled) -> Record:
    usd = None if p.upper_bound_usd is None else str(p.upper_bound_usd)
    return (p.row, p.n, p.key, usd, p.upper_bound_tokens, p.cause, p.invocation, _characters(p.request_id))


def possibly_billed(record: Record) -> PossiblyBilled:
    row, n, key, bound, tokens, cause, invocation, request_id = record
    return PossiblyBilled(row, n, key, None if bound is None else Decimal(bound), tokens, cause, invocation, request_id)


_USD = [TotalsLine.__struct_fields__.index(name) for name in ("cost_usd", "reported_cost_usd", "saved_usd")]


def totals_record(line: TotalsLine) -> Record:
    """The line's fields, with money as text: SQLite has no decimals."""
    fields = list(msgspec.structs.astuple(line))
    for place in _USD:
        fields[place] = str(fields[place])
    return tuple(fields)


def totals_line(record: Record) -> TotalsLine:
    fields = list(record)
    for place in _USD:
        fields[place] = Decimal(record[place])
    return TotalsLine(*fields)


def replaced_record(line: TotalsLine, revision: int) -> Record:
    """`revision` grows from one version of a line to the next: the figures themselves may fall."""
    return (*totals_record(line), revision)
