"""What rows become: the request of each, as the job asks it, with what one attempt can cost at most."""

import time
from decimal import Decimal

import msgspec

from batchrun import prices
from batchrun.dispatch.attempt_result import remembered, total
from batchrun.dispatch.backlog import Pending
from batchrun.errors import InputError
from batchrun.job.job import Job
from batchrun.limits.admission import Ask
from batchrun.limits.token_estimates import Estimates
from batchrun.prices import Dearest, PriceTable
from batchrun.records import Discarded, Request, Row, Verdict
from batchrun.request.builder import RequestBuilder, corrected
from batchrun.request.image_digests import ImageDigests
from batchrun.request.images import Images
from batchrun.startup.resume import Plan
from batchrun.store import variants
from batchrun.store.chunks import OpenChunk
from batchrun.store.db_tables import usd


class Requests:
    """Makes requests. Each variant of the job has its own builder."""

    def __init__(self, job: Job, plan: Plan, checked: ImageDigests, estimates: Estimates) -> None:
        """`checked` says what the rows' images were when they were checked."""
        self._plan = plan
        self._estimates = estimates
        self._max_wait_s = job.retry.max_wait_s
        self._checked = checked
        self._images = Images(job.input)
        self._builders = [RequestBuilder(variants.as_job(job, way), plan.facts.dialect) for way in plan.variants]
        self._dearest: dict[tuple[str, str | None], Dearest] = {}

    def pending(self, row: Row, chunk: OpenChunk) -> Pending:
        """The row's request, with what earlier invocations did for it.

        Raises:
            InputError: it can't be made. The check pass made this very request: the input was changed since.
        """
        reopened = chunk.reopened.get(row.row)
        variant = self._plan.facts.variant if reopened is None else reopened.variant
        try:
            request = self._builders[variant].build(row)
        except InputError as error:
            raise InputError(f"row {row.row}: {error}") from error
        if chunk.is_new:
            return Pending(request, chunk, variant=variant)
        before = 0 if reopened is None else reopened.attempts
        cost_usd = Decimal(0) if reopened is None else usd(reopened.cost_usd)
        earlier = [attempt for attempt in chunk.discarded.get(row.row, ()) if attempt.n > before]
        begun = max(before, chunk.lost.get(row.row, 0))
        refused = any(attempt.verdict is Verdict.PAUSE and self._outlives_a_start(attempt) for attempt in earlier)
        cost_usd = total([cost_usd, *(attempt.cost_usd for attempt in earlier)])
        return Pending(
            request,
            chunk,
            remembered(earlier, begun),
            cost_usd,
            refused=refused,
            variant=variant,
            set_aside=tuple(each for attempt in earlier if (each := attempt.set_aside) is not None),
        )

    def _outlives_a_start(self, refusal: Discarded) -> bool:
        """Whether the same again says that the row is at fault. A long wait has to be over for that."""
        waited_s = time.time() - refusal.at
        return refusal.http_status == 403 or (refusal.http_status == 429 and waited_s > self._max_wait_s)

    def with_pictures(self, pending: Pending) -> Request:
        """The request with its images, as they are now. For a thread: it reads files.

        Raises:
            InputError: they can't be read, or are not what was checked.
        """
        row = pending.request.row
        try:
            read = pending.chunk.window.row(row)
            request, digest = self._builders[pending.variant].whole(read, self._images.read)
            known = self._checked.of(row) if pending.variant == self._plan.facts.variant else None
            if known not in (None, digest):
                raise InputError("its images are not those that were checked")
        except InputError as error:
            ways_on = "put them back, or take the images as they are with --accept-changes"
            raise InputError(f"row {row}: {error}: changed while the run works; {ways_on}") from error
        return corrected(request, pending.corrections)

    def price(self, model: str) -> PriceTable | None:
        """What the model costs; None where nobody knows."""
        return self._plan.prices.get(model)

    def ask(self, request: Request) -> Ask:
        """What one attempt at the request takes, and may take at most."""
        prompt, output = self._estimates.of(request)
        tokens, most_tokens = prompt + output, request.upper_bound_tokens
        if (dearest := self._dearest_of(request)) is None:
            return Ask(tokens, None, most_tokens, output, request.model)
        bound_usd = dearest.bound(request.max_prompt_tokens, request.max_output_tokens)
        return Ask(tokens, bound_usd, most_tokens, output, request.model, dearest.prompt, dearest.output)

    def _dearest_of(self, request: Request) -> Dearest | None:
        """The most that its tokens can cost; None where the price is unknown."""
        table = self._plan.prices.get(request.model)
        if table is None:
            return None
        key = request.model, prices.asked_tier(table, request.body)
        if (dearest := self._dearest.get(key)) is None:
            dearest = self._dearest[key] = prices.dearest(table, key[1])
        return dearest


def identified(pending: Pending, key: bytes) -> Pending:
    """The row with its key, and still without its images: it may have to wait again."""
    return msgspec.structs.replace(pending, request=msgspec.structs.replace(pending.request, key=key))
