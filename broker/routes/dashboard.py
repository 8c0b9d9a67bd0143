"""The dashboard: one page and its parts, as they lie in `broker/dashboard/`.

Laws
    The files hold no data and are the same for everybody, so they need no key; what they show comes from `/admin`, which
    does. Host and Origin are checked as everywhere.
    They are served where `/admin` is, and nowhere else: a page asks where it came from.
    The page may load its own files and speak to its own address: no other script, no inline one, no frame around it.
    `/` is a page to who asks for HTML; to the clients that ask whether anybody is there it says so, as ever.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.routing import Route

from broker.routes.messages import hello

if TYPE_CHECKING:
    from starlette.requests import Request

_FILES = Path(__file__).resolve().parent.parent / "dashboard"
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_PAGE = "index.html"
_PARTS = ("style.css", "words.js", "pictures.js", "actions.js", "page.js")
PAGE_PATHS = ("/", *(f"/dashboard/{name}" for name in _PARTS))  # need no key
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "data:",  # the empty icon, so that no browser asks for one
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}
_HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # a daemon of another version may come back
    "vary": "accept",
}


def dashboard_routes() -> list[Route]:
    """Files are read once, here."""
    files = {name: _file(name) for name in (_PAGE, *_PARTS)}
    return [
        Route("/", partial(_front, files[_PAGE]), methods=["GET"]),
        *(
            Route(f"/dashboard/{name}", partial(_part, files[name]), methods=["GET"])
            for name in _PARTS
        ),
    ]


def _file(name: str) -> tuple[bytes, str]:
    path = _FILES / name
    return path.read_bytes(), f"{_KINDS[path.suffix]}; charset=utf-8"


async def _front(page: tuple[bytes, str], request: Request) -> Response:
    if "text/html" not in request.headers.get("accept", ""):
        return await hello(request)
    return await _part(page, request)


async def _part(file: tuple[bytes, str], request: Request) -> Response:
    content, kind = file
    return Response(content, headers={**_HEADERS, "content-type": kind})
