"""Ready is what a deployment is meant to be, waited for a bounded time; what is waited for is said in clear text."""

from __future__ import annotations

from typing import cast

import pytest

from router.limits import FleetLimits
from router.member import Member
from router.policy import Role
from router.readiness import Readiness

LIMITS = FleetLimits(warmup_s=10.0, expect_s=60.0)
P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


class Worker:
    def __init__(self, role: Role, joined_s: float = 0.0, partners: int = 0) -> None:
        self.role, self.joined_s, self.partners, self.links = role, joined_s, partners, {}  # type: ignore[var-annotated]


def why_not(readiness: Readiness, now_s: float, *workers: Worker) -> str:
    return readiness.why_not(cast("list[Member]", workers), now_s)


@pytest.mark.parametrize(
    ("expected", "roles", "missing", "bound_s"),
    [
        ((), (P,), "a decode worker", 10.0),
        ((), (D, D), "a prefill worker", 10.0),
        ((), (M,), None, 0.0),
        ((), (P, M), None, 0.0),
        ((P, D), (P,), "a decode worker", 60.0),
        ((P, D), (M,), "a decode worker and a prefill worker", 60.0),
        ((P, D, M), (P, M), "a decode worker", 60.0),
        ((P,), (P,), None, 0.0),
    ],
)
def test_a_role_is_waited_for_and_then_done_without(
    expected: tuple[Role, ...], roles: tuple[Role, ...], missing: str | None, bound_s: float
) -> None:
    readiness, workers = Readiness(frozenset(expected), LIMITS), [Worker(role, 100.0) for role in roles]
    assert why_not(readiness, 99.0) == "no worker has joined"
    why = why_not(readiness, 101.0, *workers)
    if missing is None:
        assert why == ""
        return
    assert why.startswith(f"waiting for {missing}, at most {bound_s - 1:.0f} s more")
    later = Worker(workers[0].role, 100.0 + bound_s - 1)  # a worker that comes late does not begin the wait anew
    assert why_not(readiness, 100.0 + bound_s - 0.5, *workers, later)
    assert why_not(readiness, 100.0 + bound_s, *workers, later) == ""


def test_both_roles_are_ready_with_a_link_or_after_a_while_without() -> None:
    for partners in (0, 1):
        readiness = Readiness(frozenset((P, D)), LIMITS)
        workers = Worker(P, 0.0), Worker(D, 30.0)
        assert "a link" in why_not(readiness, 39.0, *workers)
        workers[0].partners = partners
        assert why_not(readiness, 39.0 if partners else 40.0, *workers) == ""


def test_what_was_ready_stays_so_while_a_worker_is_left() -> None:
    readiness = Readiness(frozenset((P, D)), LIMITS)
    assert why_not(readiness, 1.0, Worker(P, partners=1), Worker(D)) == ""
    assert why_not(readiness, 2.0, Worker(D)) == ""
    assert why_not(readiness, 3.0) == "no worker has joined"
    assert "a decode worker" in why_not(readiness, 4.0, Worker(P, 3.5))  # all anew
