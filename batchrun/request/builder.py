"""Row + job → body and key. PURE. Three dialects of input, one encode per row.

The body is sent in the API's field order, with a row's own objects as they came. It is hashed into the `request_key`
with all names sorted, since JSON objects have no order and Parquet gives them another than JSONL.
What only decides how an answer travels (`stream`, `stream_options`) is appended to the body and left out of the key;
so are the other words in which some servers want the same question. `service_tier` and `prompt_cache_key` are left
out of the key as well.
Images that must be read are put in only when a request is sent: until then the row has a request without them.
"""

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec

from batchrun.errors import InputError, JobError
from batchrun.job import answer_schema
from batchrun.job.answer_schema import Expected
from batchrun.job.fields import OUTPUT_LIMITS, as_json, check_messages, check_parameter, plain, same_number
from batchrun.job.job import Job
from batchrun.job.settings import Endpoint, RequestTemplate
from batchrun.records import Correction, Request, Row
from batchrun.request import image_parts
from batchrun.request.frame import KEY, Frame
from batchrun.request.image_parts import Image, Picture, Source
from batchrun.request.messages import message_maker
from batchrun.request.responses_body import append_message, responses_body
from batchrun.request.templates import Columns, among

_JUDGED_BY = ("response_format", "functions", "tools")
"""The fields of a body that specify its answer, as `answer_schema.of` takes them."""

MAX_EXPECTED = 64
"""Different schemas of a batch file's lines that are kept compiled at a time."""

Body = dict[str, Any]

_SERVED_BY = frozenset({"service_tier", "prompt_cache_key"})
"""Fields that change how a request is served, and what it costs, but not the question."""

_SIZES = frozenset({*OUTPUT_LIMITS, "n"})
"""The fields that bound an answer's tokens."""


def detect_dialect(job: Job, columns: Collection[str]) -> str:
    """How the rows become messages: `input.dialect`, else what `[request]` implies, else what the columns say.

    Raises:
        InputError: neither says.
    """
    request = job.request
    if job.input.dialect != "auto":
        return job.input.dialect
    if request.prompt is not None or isinstance(request.messages, list):
        return "columns"
    if isinstance(request.messages, str):
        return "messages"
    if {"custom_id", "body"} <= set(columns):
        return "openai-batch"
    if "messages" in columns:
        return "messages"
    shown = ", ".join(list(columns)[:12]) or "none"
    raise InputError(
        f"neither job nor rows say what to send: set request.prompt, a template over the columns ({shown})"
    )


class RequestBuilder:
    """Makes the request of each row. Built once per invocation: templates are compiled, constants laid out."""

    def __init__(self, job: Job, dialect: str) -> None:
        self.dialect = dialect
        self._request = job.request
        self._endpoint_name = b"\0" + job.endpoint_name.encode()
        self._max_output_tokens = job.limits.max_output_tokens
        self._max_image_tokens = job.limits.max_image_tokens
        self._in_its_words = _wording(job.endpoint)
        self._from_columns = tuple(job.request.from_columns.items())
        self._parameters = _parameters(job.request)
        self._expected = answer_schema.of(*map(self._parameters.get, _JUDGED_BY))
        self._expected_of_lines: dict[bytes, Expected] = {}
        self._stream = _stream_fields(job.request, job.endpoint)
        sized_by_row = dialect == "openai-batch" or not _SIZES.isdisjoint(job.request.from_columns)
        self._max_output = None if sized_by_row else self._most_output(self._parameters)
        self._choices = None if sized_by_row else _choices(self._parameters)
        self._is_text = dialect == "columns" and not (job.request.images or isinstance(job.request.messages, list))
        self._frame = self._framed() if self._is_text and not self._from_columns else None
        self._messages = message_maker(job.request, dialect)
        if dialect == "openai-batch" and (unused := _unused_by_batch(job.request)) is not None:
            raise JobError(f"request.{unused}: the lines of a provider's batch file bring their own; leave it out")
        if dialect != "openai-batch" and job.request.model is None and "model" not in job.request.from_columns:
            raise JobError('request.model: name the model, for example "vtrix-gpt-5.3-codex"')

    def build(self, row: Row) -> Request:
        """The request of one row. With `pictures`, it lacks their content, and its key is empty.

        Raises:
            InputError: the row makes no valid request; the message says why, without the place.
        """
        if (frame := self._frame) is None:
            return self._made(row, None, image_parts.without)[0]
        try:
            body, key = frame.filled(row.columns)
        except UnicodeEncodeError as error:
            raise _lone_surrogate(error) from error
        return Request(
            row.row,
            key,
            body[:-1] + self._stream if self._stream else body,
            frame.model,
            len(body),
            self._max_output or 0,
            expected=self._expected,
            choices=self._choices or 1,
        )

    def identify(self, row: Row, read: Callable[[Source], Image]) -> tuple[Request, bytes]:
        """The request as `build` gives it, but with its key, and the digest of its pictures as `read` finds them.

        Raises:
            InputError: as `build`, or of a picture.
        """
        return self._made(row, read, image_parts.without)

    def whole(self, row: Row, read: Callable[[Source], Image]) -> tuple[Request, bytes]:
        """The same with the pictures in the body: what is sent. Takes milliseconds for each megabyte.

        Raises:
            InputError: as `identify`.
        """
        stream, end = b"", self._stream or b"}"  # put in at once: see `image_parts.whole`
        return self._made(row, read, lambda body: image_parts.whole(body, end), stream)

    def _framed(self) -> Frame | None:
        """The frame of all bodies; None if more than texts differs between them, or this server has its own words."""
        request = self._request
        if request.model is None or request.prompt is None or self._in_its_words is not None:
            return None
        system = [] if request.system is None else [("system", request.system)]
        texts = [*system, ("user", request.prompt)]
        return Frame(request.model, texts, self._parameters, _SERVED_BY, self._endpoint_name)

    def _made(
        self,
        row: Row,
        read: Callable[[Source], Image] | None,
        encode: Callable[[Body], bytes],
        stream: bytes | None = None,
    ) -> tuple[Request, bytes]:
        """The request as `encode` makes its body, and the digest of its pictures; empty without `read`. `stream` is
        what goes in place of the body's last brace; None: the end of the job's streams.
        """
        digest, stream = b"", self._stream if stream is None else stream
        try:
            body, pictures, details = self._with_pictures(row)
            if read is not None:
                digest = _load(pictures, read)
            key = b"" if pictures and read is None else self._key(body)
            if self._in_its_words is not None:
                body = self._in_its_words(body)
            encoded = encode(body)
            without_pictures = image_parts.without(body) if pictures else encoded
        except RecursionError as error:
            raise InputError("the request is nested too deep") from error
        except UnicodeEncodeError as error:
            raise _lone_surrogate(error) from error
        request = Request(
            row=row.row,
            key=key,
            body=encoded[:-1] + stream if stream else encoded,
            model=body["model"],
            max_prompt_tokens=len(without_pictures) + len(details) * self._max_image_tokens,
            max_output_tokens=self._most_output(body) if self._max_output is None else self._max_output,
            image_tokens=sum(image_parts.USUAL_TOKENS[detail] for detail in details) if details else 0,
            pictures=len(pictures),
            expected=self._expected_by(body),
            choices=_choices(body) if self._choices is None else self._choices,
        )
        return request, digest

    def _with_pictures(self, row: Row) -> tuple[Body, list[Picture], list[str]]:
        """The body with a `Picture` for each image that must be loaded, the pictures, and the detail of every image."""
        body = self._batch_body(row.columns) if self.dialect == "openai-batch" else self._body(row.columns)
        if self._is_text:
            return body, [], []
        body["messages"], pictures, details = image_parts.with_pictures(body["messages"])
        return body, pictures, details

    def _key(self, body: Body) -> bytes:
        if not _SERVED_BY.isdisjoint(body):
            body = {name: value for name, value in body.items() if name not in _SERVED_BY}
        key = KEY.copy()
        key.update(image_parts.canonical(body))
        key.update(self._endpoint_name)
        return key.digest()

    def _expected_by(self, body: Body) -> Expected:
        """The schema for the answer; each line of a batch file may have its own."""
        if self.dialect != "openai-batch":
            return self._expected
        wanted = tuple(map(body.get, _JUDGED_BY))
        known = image_parts.canonical(wanted)
        if known not in self._expected_of_lines:
            if len(self._expected_of_lines) >= MAX_EXPECTED:
                self._expected_of_lines.clear()
            try:
                self._expected_of_lines[known] = answer_schema.of(*wanted)
            except JobError as error:
                raise InputError(str(error)) from error
        return self._expected_of_lines[known]

    def _most_output(self, body: Body) -> int:
        """The most tokens that the answer can have, all its choices; an invalid limit is ignored."""
        limits = [_count(body.get(name)) for name in OUTPUT_LIMITS]
        return (max(limits) or self._max_output_tokens) * _choices(body)

    def _body(self, columns: Columns) -> Body:
        body: Body = {"model": self._request.model, "messages": self._messages(columns), **self._parameters}
        if self._request.images:
            body["messages"] = self._with_images(body["messages"], columns)
        for name, column in self._from_columns:
            if column not in columns:
                raise InputError(
                    f"column {column!r}, which request.from_columns.{name} names, is missing"
                    + among(tuple(columns), column)
                )
            if (value := columns[column]) is not None:
                body[name] = check_parameter(name, value)
        if body["model"] is None:
            raise InputError(f"column {self._request.from_columns['model']!r} names no model, nor does request.model")
        return body

    def _with_images(self, messages: list[Any], columns: Columns) -> list[Any]:
        """The messages with the images of the columns that the job names; a row without any of them is refused."""
        sources: list[Source] = []
        for column in self._request.images:
            if column not in columns:
                raise InputError(
                    f"column {column!r}, which request.images names, is missing" + among(tuple(columns), column)
                )
            sources += image_parts.sources_in(columns[column], column)
        if not sources:
            raise InputError(f"no image in {', '.join(self._request.images)}")
        return image_parts.with_images(messages, sources, self._request.image_detail)

    def _batch_body(self, columns: Columns) -> Body:
        """The body of a provider batch line; what it leaves open the job fills in."""
        given = as_json(columns.get("body"))
        if not isinstance(given, dict):
            raise InputError("`body` is not a JSON object")
        url = columns.get("url")
        if url is not None and not str(url).rstrip("/").endswith("/chat/completions"):
            raise InputError(f"`url` is {url!r}: only chat/completions is supported")
        given = plain(given, "body")
        model = given.get("model", self._request.model)
        if model is None:
            raise InputError("`body` names no model, nor does request.model")
        body: Body = {"model": check_parameter("model", model), "messages": check_messages(given.get("messages"))}
        own = {name: value for name, value in given.items() if name not in _NOT_PARAMETERS}
        limits = [name for name in OUTPUT_LIMITS if name in own]
        if len(limits) > 1:
            raise InputError(f"`body` has both {' and '.join(limits)}; keep one of them")
        ours = {n: value for n, value in self._parameters.items() if not (limits and n in OUTPUT_LIMITS)}
        for name, value in sorted({**ours, **own}.items(), key=_field_order):
            body[name] = check_parameter(name, value)
        return body


def _lone_surrogate(error: UnicodeEncodeError) -> InputError:
    return InputError(
        f"the request holds {error.object[error.start]!r}, half of a surrogate pair, which is not a character"
    )


def corrected(request: Request, corrections: Sequence[Correction]) -> Request:
    """The request with each invalid answer, and what is wrong with it, as messages at its end.

    It is still the same question: the key stays. The bound of its tokens grows with the body.
    """
    if not corrections:
        return request
    body = msgspec.json.decode(request.body)
    for each in corrections:
        complaint = f"This answer can't be used: {each.complaint}. Answer again so that it can."
        append_message(body, "assistant", each.answer)
        append_message(body, "user", complaint)
    longer = msgspec.json.encode(body)
    bound = request.max_prompt_tokens + len(longer) - len(request.body)
    return msgspec.structs.replace(request, body=longer, max_prompt_tokens=bound)


def _unused_by_batch(request: RequestTemplate) -> str | None:
    """A setting that would be ignored silently because each line has its whole body."""
    names = ("prompt", "system", "messages", "images", "from_columns")
    return next((name for name in names if getattr(request, name)), None)


_NOT_PARAMETERS = frozenset({"model", "messages", "stream", "stream_options"})
_FIELDS = ("reasoning_effort", "max_tokens", "temperature", "top_p", "functions", "function_call", "response_format")


def _field_order(item: tuple[str, object]) -> tuple[int, str]:
    name = item[0]
    return (_FIELDS.index(name) if name in _FIELDS else len(_FIELDS), name)


def _parameters(request: RequestTemplate) -> Body:
    """The constant fields of every body, in the API's order, then the extra ones as the job gives them."""
    fields: Body = {name: same_number(msgspec.to_builtins(getattr(request, name))) for name in _FIELDS}
    if (wanted := request.response_format) is not None:
        fields["response_format"] = {"type": wanted.type}
        if wanted.type == "json_schema":
            schema = {"name": wanted.name, "schema": wanted.schema, "strict": wanted.strict}
            fields["response_format"]["json_schema"] = schema
    extra = {name: value for name, value in request.extra.items() if name not in _NOT_PARAMETERS}
    return {name: value for name, value in fields.items() if value is not None} | extra


def _stream_fields(request: RequestTemplate, endpoint: Endpoint) -> bytes:
    """The bytes that end a streamed body in place of its brace; empty when the answer comes whole. Some servers refuse
    `stream_options`: empty ones are not sent.
    """
    if not request.stream:
        return b""
    if endpoint.dialect == "responses":
        return b',"stream":true}'  # usage is always in the last event
    options = request.extra.get("stream_options", {"include_usage": True})
    return b',"stream":true' + (b',"stream_options":' + msgspec.json.encode(options) if options else b"") + b"}"


def _wording(endpoint: Endpoint) -> Callable[[Body], Body] | None:
    """The function from a body to the one that says the same in this server's words; None where they are the usual."""
    limit, role = endpoint.max_tokens_field, endpoint.developer_role
    if endpoint.dialect == "responses":
        return responses_body
    if (limit, role) == ("max_tokens", "developer"):
        return None

    def put(body: Body) -> Body:
        if limit not in body:
            body = {limit if name == "max_tokens" else name: value for name, value in body.items()}
        messages = [{**m, "role": role} if m["role"] == "developer" else m for m in body["messages"]]
        return {**body, "messages": messages}

    return put


def _load(pictures: list[Picture], read: Callable[[Source], Image]) -> bytes:
    """Loads the image of each picture; returns the digest of all of them."""
    digest = hashlib.blake2b(digest_size=16)
    for picture in pictures:
        picture.image = read(picture.source)
        digest.update(picture.image.digest())
    return digest.digest()


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _choices(body: Body) -> int:
    return max(_count(body.get("n")), 1)
