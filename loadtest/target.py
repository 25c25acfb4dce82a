"""Where requests go."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from pdserve.slo import Slo

_GET_S = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """An OpenAI-compatible endpoint.

    Attributes:
        prefix: comes before `/completions`, as in `/v1`.
        slo: told to the server with every request, so that it judges, and queues, by what the client judges by.
    """

    host: str
    port: int
    model: str
    tls: bool = False
    prefix: str = "/v1"
    api_key: str | None = field(default=None, repr=False)
    slo: Slo | None = None

    def url(self, path: str) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}{self.prefix}{path}"

    @property
    def headers(self) -> dict[str, str]:
        """Of every request; a server that does not know ours ignores them."""
        headers = {"x-pdserve-timeline": "1"}
        if self.slo is not None:
            objectives = {"ttft_ms": self.slo.ttft_s * 1e3, "tpot_ms": self.slo.tpot_s * 1e3}
            headers["x-pdserve-slo"] = json.dumps(objectives)
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers

    def get_json(self, path: str) -> Any:
        """Raises OSError or ValueError."""
        request = urllib.request.Request(self.url(path), headers=self.headers)
        with urllib.request.urlopen(request, timeout=_GET_S) as response:
            return json.load(response)


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
    try:
        return replace(target, model=str(target.get_json("/models")["data"][0]["id"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{url} does not say which models it has ({error}); name one with --model") from error
