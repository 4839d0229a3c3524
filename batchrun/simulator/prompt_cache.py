"""An implicit prompt cache, as OpenAI describes its own. PURE.

https://developers.openai.com/api/docs/guides/prompt-caching

Each machine keeps the prefixes that it has processed, for some minutes after their last use. A request goes to the
machine that a hash of its first 256 tokens and of its `prompt_cache_key` selects. Beyond about 15 requests a minute
that machine passes requests on to others, which may not have the prefix yet.
"""

from hashlib import blake2b
from random import Random

import msgspec
from msgspec import UNSET

from batchrun.simulator.limits import ServerBucket
from batchrun.simulator.tokens import BYTES_PER_TOKEN, CACHE_FROM_TOKENS, CACHE_STEP_TOKENS
from batchrun.simulator.validate import ChatRequest, ImagePart, JSONSchemaFormat, TextPart

_ROUTING_TOKENS = 256  # this and the next: see the address above
_REQUESTS_PER_MINUTE = 15
_MACHINES = 500  # so many that a machine chosen by chance is rarely warm, as behind a large provider


class Prompt(msgspec.Struct, frozen=True):
    """The machine of a prompt, and the digest of each of its cacheable prefixes, shortest first."""

    routed_by: bytes
    prefixes: tuple[bytes, ...]


class PromptCache:
    """All machines' prefixes. `look_up` when a request arrives, `keep` once its prompt was processed."""

    def __init__(self, life_s: float, seed: int) -> None:
        """`life_s`: how long a prefix outlives its last use."""
        self._life_s = life_s
        self._random = Random(seed)
        self._homes: dict[bytes, tuple[int, ServerBucket]] = {}
        self._kept_until_s: dict[tuple[int, bytes], float] = {}

    def machine(self, prompt: Prompt, now_s: float) -> int:
        """The machine that gets this request."""
        home = self._homes.get(prompt.routed_by)
        if home is None:
            bucket = ServerBucket(_REQUESTS_PER_MINUTE, now_s, burst_s=60.0)
            home = self._homes[prompt.routed_by] = int.from_bytes(prompt.routed_by[:8]) % _MACHINES, bucket
        machine, bucket = home
        if bucket.wait_s(1, now_s) > 0:
            return self._random.randrange(_MACHINES)
        bucket.take(1)
        return machine

    def look_up(self, prompt: Prompt, machine: int, now_s: float) -> int:
        """The number of the prompt's tokens that the machine has."""
        for index in range(len(prompt.prefixes) - 1, -1, -1):
            if self._kept_until_s.get((machine, prompt.prefixes[index]), 0.0) > now_s:
                self.keep(msgspec.structs.replace(prompt, prefixes=prompt.prefixes[: index + 1]), machine, now_s)
                return CACHE_FROM_TOKENS + index * CACHE_STEP_TOKENS
        return 0

    def keep(self, prompt: Prompt, machine: int, now_s: float) -> None:
        """The machine has the prompt's prefixes from now on."""
        for prefix in prompt.prefixes:
            self._kept_until_s[machine, prefix] = now_s + self._life_s


def prompt_of(request: ChatRequest) -> Prompt:
    """The parts of a request that the cache reads: tools, schema and messages, in that order."""
    parts: list[bytes] = []
    if request.functions or request.tools:
        parts.append(msgspec.json.encode((request.functions, request.tools)))
    if isinstance(request.response_format, JSONSchemaFormat):
        parts.append(msgspec.json.encode(request.response_format.json_schema.schema))
    for message in request.messages:
        parts.append(f"\n{message.role}\n".encode())
        for part in message.content if isinstance(message.content, tuple) else (message.content,):
            if isinstance(part, TextPart):
                parts.append(part.text.encode())
            elif isinstance(part, ImagePart):
                parts.append(part.image_url.url.encode())
            elif isinstance(part, str):
                parts.append(part.encode())
    text = b"".join(parts)

    digest = blake2b(text[: _ROUTING_TOKENS * BYTES_PER_TOKEN], digest_size=16)
    digest.update(b"" if request.prompt_cache_key is UNSET else str(request.prompt_cache_key).encode())
    chain, prefixes = blake2b(request.model.encode(), digest_size=16), list[bytes]()
    for end in range(CACHE_FROM_TOKENS, len(text) // BYTES_PER_TOKEN + 1, CACHE_STEP_TOKENS):
        start = 0 if end == CACHE_FROM_TOKENS else end - CACHE_STEP_TOKENS
        chain.update(text[start * BYTES_PER_TOKEN : end * BYTES_PER_TOKEN])
        prefixes.append(chain.copy().digest())
    return Prompt(digest.digest(), tuple(prefixes))
