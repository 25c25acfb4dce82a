"""Where requests go."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Target:
    """An OpenAI-compatible endpoint; `prefix` comes before `/completions`, as in `/v1`."""

    host: str
    port: int
    model: str
    tls: bool = False
    prefix: str = "/v1"
    api_key: str | None = field(default=None, repr=False)


def parse_target(url: str, model: str, api_key: str | None = None) -> Target:
    """`http://host:8000` and `https://host/v1` alike. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no http:// or https:// URL")
    tls = parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    return Target(parts.hostname, port, model, tls, parts.path.rstrip("/") or "/v1", api_key)


def find_target(url: str, model: str | None, api_key: str | None = None) -> Target:
    """With the first model that the endpoint lists, unless one is named. Raises ValueError: one sentence for a user."""
    target = parse_target(url, model or "", api_key)
    if model:
        return target
    scheme = "https" if target.tls else "http"
    request = urllib.request.Request(f"{scheme}://{target.host}:{target.port}{target.prefix}/models")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return replace(target, model=str(json.load(response)["data"][0]["id"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{url} does not say which models it has ({error}); name one with --model") from error
