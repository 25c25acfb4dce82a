"""Who sent a request."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.tenants import NOBODY, Tenant

WHAT_OPERATORS_NEED = (
    "it needs the admin key (x-pdserve-admin-key), or, where there is none, a caller on the router's machine."
)


@dataclass(frozen=True, slots=True)
class Caller:
    """
    Attributes:
        turns: whom its turns in the queue are counted for, and who may read its records: the tenant's name; without
            tenants a digest of whatever credentials came.
        operator: may steer the router itself, and see what is about all tenants.
    """

    tenant: Tenant = NOBODY
    turns: str = "default"
    operator: bool = False


ANYBODY = Caller()
