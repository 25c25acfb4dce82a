"""Who may ask for what. Deny by default: a path that is not named here needs a tenant's API key.

    open        liveness, readiness, version, and pages without data
    operators   metrics, the fleet, administration: the admin key
    tenants     everything else: an API key of the tenants' file, or the admin key

Without a tenants' file there is one tenant, whoever calls: everything is open but what needs an operator by itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from hashlib import blake2b
from urllib.parse import urlsplit

from starlette.types import Scope

from pdserve.errors import ConfigError, Forbidden, Unauthorized
from pdserve.tenants import NOBODY, Tenant, TenantsFile, cache_salt
from router.caller import ANYBODY, WHAT_OPERATORS_NEED, Caller
from router.http.trust import Trust, bearer

CALLER_KEY = "pdserve.caller"  # in the ASGI scope

_OPEN = frozenset({"/livez", "/readyz", "/ping", "/health", "/version", "/openapi.json", "/docs", "/", "/admin"})
_OPERATORS = frozenset({"/metrics", "/workers", "/v1/pools", "/v1/topology", "/v1/slo"})
_REFRESH_S = 1.0

audit = logging.getLogger("pdserve.audit")


class Access:
    """`tenants`: None lets everybody in. `trust` says who is an operator."""

    def __init__(
        self, trust: Trust, tenants: TenantsFile | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises ConfigError: where tenants are kept apart, being on this machine makes nobody an operator."""
        if tenants is not None and trust.admin_key is None:
            raise ConfigError("--tenants-file needs --admin-key-file: what is about all tenants is for operators only.")
        self._trust = trust
        self._file = tenants
        self._clock = clock
        self._fresh_until_s = 0.0

    def admit(self, scope: Scope) -> Caller:
        """As `caller`, of an HTTP request; a refusal is logged."""
        path, client_host = scope["path"], (scope.get("client") or (None,))[0]
        try:
            return self.caller(path, client_host, dict(scope["headers"]))
        except (Unauthorized, Forbidden) as error:
            audit.warning("refused status=%d path=%r client=%s", error.status, path[:64], client_host)
            raise

    def caller(self, path: str, client_host: str | None, headers: Mapping[bytes, bytes]) -> Caller:
        """
        Args:
            client_host: the peer's address; None on a Unix socket.

        Raises:
            Unauthorized, Forbidden: they may not ask for this.
        """
        operator = self._trust.covers(client_host, headers) and _same_origin(headers)
        if path.startswith("/admin/") and not operator:
            raise Forbidden(f"This is for operators: {WHAT_OPERATORS_NEED}")
        if self._file is None:
            return Caller(turns=_digest(headers.get(b"authorization")), operator=operator)
        if path in _OPEN or path.startswith("/console/"):
            return Caller(operator=operator)
        tenant = self._tenant(headers)
        if path in _OPERATORS and not operator:
            raise (Unauthorized if tenant is None else Forbidden)(
                "This is for operators: it needs the admin key (x-pdserve-admin-key)."
            )
        if tenant is None:
            if not operator:
                raise Unauthorized("A valid API key is needed: Authorization: Bearer KEY.")
            tenant = NOBODY
        return Caller(tenant, tenant.name or ANYBODY.turns, operator)

    def shows_fleet(self, caller: Caller) -> bool:
        """Whether workers and their addresses may be told to this caller on a path that is open."""
        return caller.operator or self._file is None

    def cache_salt(self, tenant: Tenant, narrowed: str | None) -> bytes:
        """For the root of the request's block keys; `narrowed` is the client's own salt."""
        if self._file is not None:
            return self._file.tenants.cache_salt(tenant, narrowed or "")
        return cache_salt(b"", "", narrowed) if narrowed else b""

    def _tenant(self, headers: Mapping[bytes, bytes]) -> Tenant | None:
        assert self._file is not None
        if (now_s := self._clock()) >= self._fresh_until_s:
            self._fresh_until_s = now_s + _REFRESH_S
            try:
                if self._file.refresh():
                    audit.info("tenants read again")
            except ConfigError as error:
                audit.error("tenants not read again, those read before stay: %s", error)
        key = bearer(headers)
        return self._file.tenants.find(key, time.time()) if key is not None else None


def _same_origin(headers: Mapping[bytes, bytes]) -> bool:
    """Browsers name the page that asks. One of another origin has no business here, even on the operator's machine."""
    origin = headers.get(b"origin")
    return origin is None or urlsplit(origin).netloc == headers.get(b"host")


def _digest(credentials: bytes | None) -> str:
    """Credentials that nobody checks are not kept either."""
    return blake2b(credentials, digest_size=8).hexdigest() if credentials else ANYBODY.turns
