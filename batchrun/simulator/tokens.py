"""The tokens of a request: a deterministic estimate, plausible and cheap rather than exact. PURE."""

import msgspec
from msgspec import UNSET

from batchrun.simulator.validate import ChatRequest, ImagePart, JSONSchemaFormat, Message, TextPart

BYTES_PER_TOKEN = 4  # English prose under the usual vocabularies
_MESSAGE_TOKENS = 4  # the frame around each message
_REPLY_TOKENS = 3  # the start of the reply
_IMAGE_TOKENS = {"low": 85, "high": 765, "auto": 765}  # one size for all images
# What OpenAI documents of prompt caching: prefixes from 1,024 tokens on, in steps of 128.
CACHE_FROM_TOKENS = 1_024
CACHE_STEP_TOKENS = 128


def text_tokens(text: str) -> int:
    """UTF-8 bytes / 4, rounded up."""
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def prompt_tokens(request: ChatRequest) -> int:
    """The messages, functions and schema of a request."""
    count = _REPLY_TOKENS + sum(_message_tokens(message) for message in request.messages)
    if request.functions or request.tools:
        count += text_tokens(msgspec.json.encode((request.functions, request.tools)).decode())
    if isinstance(request.response_format, JSONSchemaFormat):
        count += text_tokens(msgspec.json.encode(request.response_format.json_schema.schema).decode())
    return count


def cached_tokens(request: ChatRequest) -> int:
    """The part of the prompt that a cache would hold: a long system prompt at its start, whole steps of it."""
    first = request.messages[0]
    if first.role not in ("system", "developer"):
        return 0
    count = _message_tokens(first)
    return count - count % CACHE_STEP_TOKENS if count >= CACHE_FROM_TOKENS else 0


def _message_tokens(message: Message) -> int:
    name = 0 if message.name is UNSET else text_tokens(str(message.name))
    calls = sum(text_tokens(call.name) + text_tokens(call.arguments) for call in message.calls())
    count = _MESSAGE_TOKENS + name + calls
    if isinstance(message.content, str):
        return count + text_tokens(message.content)
    for part in message.content if isinstance(message.content, tuple) else ():
        if isinstance(part, ImagePart):
            count += _IMAGE_TOKENS[part.image_url.detail]
        else:
            count += text_tokens(part.text if isinstance(part, TextPart) else part.refusal)
    return count
