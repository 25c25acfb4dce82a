"""Who may steer the router itself: whoever has the admin key; where none is configured, whoever is on this machine."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

ADMIN_KEY_HEADER = b"x-pdserve-admin-key"


@dataclass(frozen=True, slots=True)
class Trust:
    """`admin_key`: None if none is configured."""

    admin_key: bytes | None = None

    def covers(self, client_host: str | None, headers: Mapping[bytes, bytes]) -> bool:
        """`client_host` is the peer's address; None on a Unix socket, which only this machine reaches.

        The key comes in a header of its own, or as a bearer's token, which is what Prometheus can send.
        """
        if self.admin_key is None:
            return client_host is None or _is_loopback(client_host)
        given = headers.get(ADMIN_KEY_HEADER) or (bearer(headers) or "").encode()
        return hmac.compare_digest(given, self.admin_key)


def bearer(headers: Mapping[bytes, bytes]) -> str | None:
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


@lru_cache(maxsize=1024)
def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
