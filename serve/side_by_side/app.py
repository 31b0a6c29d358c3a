"""The application of the page: two fronts below ``/before`` and ``/after``, the page, and what each takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse, Response

from serve.front.app import Front, add_error_handlers, build_app

SIDES = ("before", "after")
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    # Nothing from elsewhere, nothing inline, in no other page's frame.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def build_page(
    fronts: Mapping[str, Front], memory_bytes: Mapping[str, Callable[[], int]], *, needs_key: bool
) -> FastAPI:
    """Return the application for the fronts of both :data:`SIDES`.

    ``memory_bytes`` say what the processes of each side take. The page itself is shown to everyone; what it
    asks wants a key when the fronts have keys.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_error_handlers(app)
    for path, (name, media_type) in _FILES.items():
        app.add_api_route(path, _page(name, media_type), methods=["GET"])
    guards = [Depends(fronts["before"].require_origin), Depends(fronts["before"].require_key)]

    async def sides() -> dict[str, Any]:
        return {side: fronts[side].description() | {"memory_bytes": memory_bytes[side]()} for side in SIDES}

    async def health() -> JSONResponse:
        answers = [await fronts[side].health() for side in SIDES]
        return max(answers, key=lambda answer: answer.status_code)

    async def needs() -> dict[str, bool]:
        return {"key": needs_key}

    app.add_api_route("/needs", needs, methods=["GET"])
    app.add_api_route("/sides", sides, methods=["GET"], dependencies=guards)
    app.add_api_route("/health", health, methods=["GET"])
    for side in SIDES:
        app.mount(f"/{side}", build_app(fronts[side]))
    return app


def _page(name: str, media_type: str) -> Callable[[], Any]:
    text = resources.files("serve.side_by_side").joinpath(name).read_text(encoding="utf-8")

    async def answer() -> Response:
        return Response(text, media_type=media_type, headers=_HEADERS)

    return answer
