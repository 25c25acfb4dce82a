"""The web console's files, read once at start and served from memory: a path is a key of a table, never of the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent.parent / "console"
INDEX, REFERENCE = "index.html", "reference.html"
_POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    body: bytes
    media_type: str
    etag: str  # quoted, as in the header


def load_assets(folder: Path) -> Mapping[str, Asset]:
    """By name; of files with another ending than a page is made of, none."""
    return {
        path.name: Asset(body, _TYPES[path.suffix], f'"{hashlib.blake2b(body, digest_size=16).hexdigest()}"')
        for path in folder.iterdir()
        if path.suffix in _TYPES
        for body in [path.read_bytes()]
    }


def console_routes() -> list[Route]:
    """GET / (the console), /docs (the API's page) and /console/{name} (what they are made of)."""
    assets = load_assets(FOLDER)

    async def console(request: Request) -> Response:
        page = REFERENCE if request.url.path == "/docs" else INDEX
        asset = assets.get(request.path_params.get("name", page))
        if asset is None:
            raise HTTPException(404)
        headers = {
            "etag": asset.etag,
            "cache-control": "no-cache",  # kept, but asked about each time: an upgraded router shows its own page
            "content-security-policy": _POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if asset.etag in known:
            return Response(status_code=304, headers=headers)
        return Response(asset.body, media_type=asset.media_type, headers=headers)

    return [Route("/", console), Route("/docs", console), Route("/console/{name:path}", console)]
