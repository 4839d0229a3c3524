"""Makes the request of each row, and what one attempt of it reserves at the gate."""

import time

import msgspec

from batchrun import prices
from batchrun.dispatch.attempt_result import add_costs, history_of
from batchrun.dispatch.backlog import Pending
from batchrun.errors import InputError
from batchrun.job.job import Job
from batchrun.limits.admission import Demand
from batchrun.limits.token_estimates import Estimates
from batchrun.prices import HighestPrices
from batchrun.records import Discarded, Request, Row, Verdict
from batchrun.request.builder import RequestBuilder, corrected
from batchrun.request.image_digests import ImageDigests
from batchrun.request.images import Images
from batchrun.startup.resume import Plan
from batchrun.store import variants
from batchrun.store.db_tables import Reopened, pico_usd
from batchrun.store.open_chunk import OpenChunk


class Requests:
    """Makes requests. Each variant of the job has its own builder. `prices` has each model's; None: unknown."""

    def __init__(self, job: Job, plan: Plan, checked: ImageDigests, estimates: Estimates) -> None:
        """`checked` has the digests of the rows' images as the check pass saw them."""
        self._plan = plan
        self.prices = plan.prices
        self._estimates = estimates
        self._max_wait_s = job.retry.max_wait_s
        self._service_tiers = job.service_tiers
        self._checked = checked
        self._images = Images(job.input)
        self._builders = [RequestBuilder(variants.as_job(job, way), plan.manifest.dialect) for way in plan.variants]
        self._highest: dict[tuple[str, str | None], HighestPrices] = {}

    def pending(self, row: Row, chunk: OpenChunk) -> Pending:
        """The row's request, with the history of its attempts in earlier starts.

        Raises:
            InputError: it can't be made. The check pass made it, so the input has changed since.
        """
        reopened = chunk.earlier.reopened.get(row.row)
        variant = self._plan.manifest.variant if reopened is None else reopened.variant
        try:
            request = self._builders[variant].build(row)
        except InputError as error:
            raise InputError(f"row {row.row}: {error}") from error
        if chunk.is_new:
            return Pending(request, chunk, variant=variant)
        return self._sent_before(request, chunk, variant, reopened)

    def _sent_before(self, request: Request, chunk: OpenChunk, variant: int, reopened: Reopened | None) -> Pending:
        """The row with what earlier starts sent for it."""
        row = request.row
        before = 0 if reopened is None else reopened.attempts
        cost = 0 if reopened is None else pico_usd(reopened.cost_usd)
        earlier = [attempt for attempt in chunk.earlier.discarded.get(row, ()) if attempt.n > before]
        last_sent = max(before, chunk.earlier.lost.get(row, 0))
        refused = any(attempt.verdict is Verdict.PAUSE and self._is_evidence(attempt) for attempt in earlier)
        return Pending(
            request,
            chunk,
            history_of(earlier, last_sent),
            add_costs(cost, *(attempt.cost_pico_usd for attempt in earlier)),
            refused=refused,
            variant=variant,
            set_aside=tuple(each for attempt in earlier if (each := attempt.set_aside) is not None),
        )

    def _is_evidence(self, refusal: Discarded) -> bool:
        """Whether the same refusal again would show that the row is at fault; after a 429 only once the longest
        wait is over.
        """
        waited_s = time.time() - refusal.at
        return refusal.http_status == 403 or (refusal.http_status == 429 and waited_s > self._max_wait_s)

    def with_pictures(self, pending: Pending) -> Request:
        """The request with its images in the body. Reads files: call it in a thread.

        Raises:
            InputError: the images can't be read, or have changed since the check pass.
        """
        row = pending.request.row
        try:
            input_row = pending.chunk.window.row(row)
            request, digest = self._builders[pending.variant].whole(input_row, self._images.read)
            known = self._checked.of(row) if pending.variant == self._plan.manifest.variant else None
            if known not in (None, digest):
                raise InputError("its images have changed since they were checked")
        except InputError as error:
            fixes = "restore them, or accept the images as they are with --accept-changes"
            raise InputError(f"row {row}: {error}, while the run was working; {fixes}") from error
        return corrected(request, pending.corrections)

    def reservation(self, request: Request) -> Demand:
        """The tokens and USD that one attempt is expected to take, and the most it can take."""
        prompt, output = self._estimates.of(request)
        tokens, most_tokens = prompt + output, request.max_prompt_tokens + request.max_output_tokens
        highest = None
        if (table := self.prices.get(request.model)) is not None:
            key = request.model, None if not table.services else prices.requested_tier(table, request.body)
            if (highest := self._highest.get(key)) is None:
                requested_tiers = self._service_tiers if key[1] is None else (key[1],)
                highest = self._highest[key] = prices.highest_prices(table, *requested_tiers)
        if highest is None:
            return Demand(tokens, None, most_tokens, output, request.model)
        bound = highest.bound(request.max_prompt_tokens, request.max_output_tokens)
        return Demand(tokens, bound, most_tokens, output, request.model, highest.prompt, highest.output)


def with_key(pending: Pending, key: bytes) -> Pending:
    """The row with its key, but without its images, which would fill memory while it waits for a retry."""
    return msgspec.structs.replace(pending, request=msgspec.structs.replace(pending.request, key=key))
