"""A refusal by the simulator: a status and an OpenAI-like error body."""

import msgspec


class Refused(Exception):
    """The request gets this error in place of a completion; nothing is billed."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None,
        param: str | None = None,
        error_type: str = "invalid_request_error",
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.error_type = error_type
        self.headers = headers

    def body(self) -> bytes:
        """The JSON error body (docs/api.md, "Errors": the shape is practice, the vendor documents none)."""
        error = {"message": self.message, "type": self.error_type, "code": self.code, "param": self.param}
        return msgspec.json.encode({"error": error})
