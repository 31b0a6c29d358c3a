"""Errors in OpenAI's shape."""

from __future__ import annotations

from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


TOO_LONG = "context_length_exceeded"
"""OpenAI's code for a prompt that the context cannot hold."""

_TOO_LONG_SIGNS = ("maximum context length",)  # vLLM says so in words only

_REFUSING_SIGNS = (
    "Failed to parse tools",
    "Failed to parse messages",
    "Unknown reasoning format",
    "input is not supported",
)
"""What llama.cpp says of requests that cannot be, with status 500."""


class ApiError(Exception):
    """An answer other than the one asked for: a status, one sentence, and the field at fault if any."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """Return the answer's JSON: ``{"error": {"message", "type", "param", "code"}}``."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def too_long(num_prompt_tokens: int, context_tokens: int) -> ApiError:
    """Return the refusal of a prompt that leaves no room for an answer, with the numbers."""
    return ApiError(
        400,
        f"the prompt has {num_prompt_tokens} tokens and the context holds {context_tokens}, one of which the "
        "answer needs; shorten it or serve with a larger --context",
        code=TOO_LONG,
    )


def from_engine(status: int, body: Any) -> ApiError:
    """Return an engine's refusal, whichever shape it has, as an :class:`ApiError`.

    Engines answer with ``{"error": {...}}``, ``{"error": "text"}``, ``{"detail": ...}`` or plain text.
    """
    found = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    if isinstance(found, dict):
        param, code = found.get("param"), found.get("code")
        message = str(found.get("message", found))
        if found.get("type") == "exceed_context_size_error" and "n_prompt_tokens" in found:
            return too_long(int(found["n_prompt_tokens"]), int(found["n_ctx"]))
        named = code if isinstance(code, str) else None
        if any(sign in message for sign in _REFUSING_SIGNS):
            status = 400
        if any(sign in message for sign in _TOO_LONG_SIGNS):
            named = TOO_LONG
        return ApiError(status, message, param=param if isinstance(param, str) else None, code=named)
    return ApiError(status, str(found) or f"the engine answered with status {status} and no reason")
