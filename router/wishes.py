"""What a client says in headers about where and how soon its request is to be served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pdserve.errors import Forbidden, InvalidRequest
from router.caller import ANYBODY, WHAT_OPERATORS_NEED, Caller
from router.policy import POLICIES
from router.slo import CLASSES, STANDARD, SloClass, parse_slo


@dataclass(frozen=True, slots=True)
class Wishes:
    tenant: str = ANYBODY.turns  # whom its turns are counted for
    label: str = ""  # the client's own id of the request; finds its record too
    target: str | None = None  # x-pdserve-worker
    policy: str | None = None  # x-pdserve-policy; None: the router's
    session: str | None = None  # x-pdserve-session
    slo: SloClass = CLASSES[STANDARD]  # x-pdserve-slo: a class, or {"ttft_ms": .., "tpot_ms": ..}
    trace_context: Mapping[str, str] = field(default_factory=dict)  # W3C's: the span that the request belongs under
    priority: int = 0  # seconds by which its turn counts as due later; below 0 earlier. From the request's body

    @classmethod
    def from_headers(cls, headers: Mapping[bytes, bytes], caller: Caller, label: str = "", priority: int = 0) -> Wishes:
        """
        Raises:
            Forbidden: for a policy, which only operators choose.
            InvalidRequest: for a policy or a class that does not exist.
        """
        policy = _text(headers, b"x-pdserve-policy")
        if policy is not None and not caller.operator:
            raise Forbidden(f"x-pdserve-policy is for operators: {WHAT_OPERATORS_NEED}")
        if policy is not None and policy not in POLICIES:
            raise InvalidRequest(f"No policy is named '{policy[:64]}'; there are {', '.join(POLICIES)}.")
        slo = _text(headers, b"x-pdserve-slo") or caller.tenant.slo
        return cls(
            tenant=caller.turns,
            label=label,
            target=_text(headers, b"x-pdserve-worker"),
            policy=policy,
            session=_text(headers, b"x-pdserve-session"),
            slo=parse_slo(slo) if slo else CLASSES[STANDARD],
            trace_context=_trace_context(headers),
            priority=priority,
        )


def _trace_context(headers: Mapping[bytes, bytes]) -> dict[str, str]:
    """Unchecked: who makes spans of it checks it."""
    if b"traceparent" not in headers:  # without it a state means nothing
        return {}
    found = {name: _text(headers, name.encode()) for name in ("traceparent", "tracestate")}
    return {name: value for name, value in found.items() if value is not None}


def _text(headers: Mapping[bytes, bytes], name: bytes) -> str | None:
    value = headers.get(name)
    return value.decode("latin-1") if value else None


NO_WISHES = Wishes()
