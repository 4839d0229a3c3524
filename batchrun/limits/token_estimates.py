"""Estimates the tokens of requests without a tokenizer, learning from the API's own usage. PURE.

A prompt is its bytes times a learned ratio, plus its images' usual tokens times another; an answer is a high quantile
of the answers so far. Both are corrected when the usage arrives, so a wrong estimate costs a little time and never a
limit.
"""

from collections import deque

import msgspec

from batchrun.records import Request, Usage

ENTRY = "learned"
"""The manifest entry of `TokenEstimates`."""

TOKENS_PER_BYTE = 0.3
"""The initial ratio: English prose has 4 to 5 bytes a token, code and JSON about 3."""

OUTPUT_TOKENS = 1_000
"""The estimate for a model's first answer; `max_tokens` is never exceeded."""

KEEP = 0.99
"""The weight a ratio keeps with every answer: about the last hundred count, because inputs vary along a file."""

ANSWERS = 200
QUANTILE = 0.9
EVERY = 10
"""The estimate of an answer is the 90 % quantile of the last 200, updated with every tenth: a low estimate sends more
than the limit allows, a high one only waits for its refund."""


class Sizes(msgspec.Struct, frozen=True):
    """What is known about one model's requests."""

    tokens_per_byte: float = TOKENS_PER_BYTE
    image_share: float = 1.0
    """The actual tokens of images over their usual number (`Request.image_tokens`)."""
    output_tokens: float = OUTPUT_TOKENS


class TokenEstimates(msgspec.Struct, frozen=True):
    """What one process passes to the next: sizes by model, and limits found without being configured."""

    sizes: dict[str, Sizes] = {}
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    in_flight: int | None = None


class _Model:
    """One model's running sums."""

    __slots__ = ("_answers", "_bytes", "_image_tokens", "_tokens", "_usual", "count", "sizes")

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.count = 0
        self._bytes = self._tokens = self._usual = self._image_tokens = 0.0
        self._answers: deque[int] = deque(maxlen=ANSWERS)

    def learn(self, text_bytes: int, image_tokens: int, usage: Usage) -> None:
        """Learns from one more answer."""
        if image_tokens:
            of_images = max(0.0, usage.prompt_tokens - text_bytes * self.sizes.tokens_per_byte)
            self._usual = self._usual * KEEP + image_tokens
            self._image_tokens = self._image_tokens * KEEP + of_images
        else:
            self._bytes = self._bytes * KEEP + text_bytes
            self._tokens = self._tokens * KEEP + usage.prompt_tokens
        self._answers.append(usage.completion_tokens)
        self.count += 1
        if self.count > EVERY and self.count % EVERY:
            return
        answers = sorted(self._answers)
        self.sizes = Sizes(
            self._tokens / self._bytes if self._bytes else self.sizes.tokens_per_byte,
            self._image_tokens / self._usual if self._usual else self.sizes.image_share,
            answers[int(QUANTILE * (len(answers) - 1))],
        )


class Estimates:
    """Estimates the tokens of requests, better with every answer."""

    def __init__(self, known: dict[str, Sizes]) -> None:
        self._models = {model: _Model(sizes) for model, sizes in known.items()}

    def of(self, request: Request) -> tuple[int, int]:
        """The estimate (prompt tokens, completion tokens) of a request."""
        model = self._models.get(request.model)
        sizes = _UNKNOWN if model is None else model.sizes
        prompt, output = len(request.body) * sizes.tokens_per_byte, sizes.output_tokens
        if request.image_tokens:
            prompt += request.image_tokens * sizes.image_share
        return int(prompt), int(output) if output < request.max_output_tokens else request.max_output_tokens

    def learn(self, request: Request, usage: Usage) -> None:
        """Learns from an answer's usage. A prompt count of zero is ignored."""
        if usage.prompt_tokens <= 0:
            return
        if (model := self._models.get(request.model)) is None:
            model = self._models[request.model] = _Model(_UNKNOWN)
        model.learn(len(request.body), request.image_tokens, usage)

    def sizes(self) -> dict[str, Sizes]:
        """What is known now, by model."""
        return {name: model.sizes for name, model in self._models.items()}


_UNKNOWN = Sizes()


def decode(entry: str | None) -> TokenEstimates:
    """Reads the manifest entry; empty if it is missing or of another version."""
    try:
        return msgspec.json.decode(entry or "{}", type=TokenEstimates)
    except msgspec.MsgspecError:
        return TokenEstimates()


def encode(learned: TokenEstimates) -> str:
    """The manifest entry."""
    return msgspec.json.encode(learned).decode()
