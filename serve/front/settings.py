"""How the front behaves."""

from __future__ import annotations

from dataclasses import dataclass

MAX_BODY_BYTES = 8 * 2**20
BODY_TIMEOUT_S = 30.0
MAX_REQUESTS = 512


@dataclass(frozen=True)
class FrontSettings:
    """``keys`` are the API keys that are taken, none asked for when empty; ``model`` the name that is served.

    ``context_tokens`` is shown with the model. On loopback only this machine's own names are taken for the
    host. At most ``max_requests`` requests are under way, more are answered with 429; a body larger than
    ``max_body_bytes`` or slower than ``body_timeout_s`` is refused.
    """

    model: str
    keys: tuple[str, ...] = ()
    context_tokens: int | None = None
    is_loopback: bool = True
    max_requests: int = MAX_REQUESTS
    max_body_bytes: int = MAX_BODY_BYTES
    body_timeout_s: float = BODY_TIMEOUT_S
