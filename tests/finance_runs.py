"""The runs of docs/cost.md's questions: twelve nights of two jobs, the same on every machine."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

from batchrun.run_summary import TotalsLine
from tests.result_files import MODEL, row, write_result

PRICES = {MODEL: (Decimal("1.25"), Decimal(10)), "vtrix-mini": (Decimal("0.25"), Decimal(2))}
FIRST = datetime(2026, 10, 26, 1, tzinfo=UTC)
ROWS = 120


def write(folder: Path) -> None:
    """`runs/`, an invoice of the last night of reviews, and other prices."""
    for number in range(12):
        started = FIRST + timedelta(days=number)
        reviews(folder / "runs" / "reviews" / f"{started:%Y-%m-%d}", started, number)
        tickets(folder / "runs" / "tickets" / f"{started:%Y-%m-%d}", started + timedelta(hours=2), number)
    (folder / "invoice.csv").write_text(invoice(11))
    (folder / "prices.toml").write_text('[pricing."vtrix-mini"]\ninput = 0.5\noutput = 4\n')


def cost(model: str, prompt: int, completion: int) -> Decimal:
    """USD, by hand."""
    into, out = PRICES[model]
    return (prompt * into + completion * out) / 1_000_000


def reviews(place: Path, started: datetime, number: int) -> None:
    """The last night's answers are twice as long; each third night has answers that were requested again."""
    rows = []
    for at in range(ROWS):
        model, prompt, completion = (MODEL, 900 + at, 40 * (1 + (number == 11)))
        usd = cost(model, prompt, completion)
        status = "truncated" if at % 40 == 7 else "ok"
        changes = {
            **{"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
            **{"cached_tokens": 512, "cost_usd": usd, "answer_cost_usd": usd, "status": status},
            **{"latency_s": 1 + at / 100, "finished_at": started + timedelta(seconds=at)},
            "request_id": f"req_{number}_{at}",
        }
        rows.append(row(at, **changes))
    again = TotalsLine(
        *(1, MODEL, "discarded", f"{started:%Y-%m-%d}"),
        attempts=4,
        prompt_tokens=4000,
        completion_tokens=200,
        total_tokens=4200,
        cost_usd=cost(MODEL, 4000, 200),
    )
    estimate = {"rows": ROWS, "prompt_tokens": 0, "completion_tokens": 0, "low_usd": "0.1", "expected_usd": "0.2"}
    write_result(
        place,
        rows,
        also=[again] if number % 3 == 2 else [],
        job="reviews",
        run_id=f"a{number:011d}",
        tags={"team": "search"},
        created_at=started.isoformat(),
        updated_at=(started + timedelta(seconds=ROWS)).isoformat(),
        possibly_billed_count=2 if number % 3 == 2 else 0,
        possibly_billed_usd="0.0123" if number % 3 == 2 else "0",
        estimate={**estimate, "high_usd": "0.3", "minutes": 2.0, "limited_by": "rpm", "basis": "the job's own counts"},
    )


def tickets(place: Path, started: datetime, number: int) -> None:
    """Two models, one of which has no price; the last night is not complete."""
    rows = []
    for at in range(ROWS):
        model = "house-model" if at % 6 == 0 else "vtrix-mini"
        usd = None if model == "house-model" else cost(model, 300, 25)
        changes = {"prompt_tokens": 300, "completion_tokens": 25, "total_tokens": 325, "model": model}
        rows.append(
            row(at, **changes, requested_model=model, cost_usd=usd, answer_cost_usd=usd, latency_s=0.5)
            | {"finished_at": started + timedelta(seconds=at), "request_id": f"tick_{number}_{at}"}
        )
    last = number == 11
    write_result(
        place,
        rows[: 90 if last else ROWS],
        job="tickets",
        run_id=f"b{number:011d}",
        tags={"team": "support"},
        created_at=started.isoformat(),
        updated_at=(started + timedelta(seconds=ROWS)).isoformat(),
        rows=ROWS,
        complete=not last,
        pending=30 if last else 0,
        reason="the deadline is near" if last else None,
    )


def invoice(number: int) -> str:
    """One request costs more there, one is missing, and one is unknown here."""
    lines = ["request_id,amount_usd"]
    for at in range(1, ROWS):
        usd = cost(MODEL, 900 + at, 40 * (1 + (number == 11)))
        lines.append(f"req_{number}_{at},{usd + (Decimal('0.001') if at == 5 else 0):f}")
    return "\n".join([*lines, "req_unknown,0.002"]) + "\n"
