"""A request that gets no answer: its status and the error object that OpenAI's clients read."""

import json
from collections.abc import Mapping
from typing import Any

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refusal(Exception):  # noqa: N818
    """Ends a request with an error.

    Args:
        status: HTTP status.
        message: What happened, what was expected, how to fix it.
        param: The field of the request that is wrong.
        code: One word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code = param, code
        self.headers = dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        values = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": values}

    def to_bytes(self) -> bytes:
        """`to_dict` as JSON."""
        return to_json(self.to_dict())


def bad(message: str, param: str | None = None, *, code: str | None = None) -> Refusal:
    """A request that is wrong in itself (400)."""
    return Refusal(400, message, param=param, code=code)


def failed() -> Refusal:
    """The engine failed (500); the reason is in the log of the server."""
    return Refusal(500, "the server failed to make this answer; its log says why", code="failed")


def stopping() -> Refusal:
    """The server ends before the answer does (503)."""
    return Refusal(503, "the server is stopping", code="stopping")


def to_json(values: Any) -> bytes:
    """Compact JSON; a number that JSON does not have is an error of ours."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()
