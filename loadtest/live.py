"""The server's live goodput: good requests by its own clock and count, which dashboards show too."""

from __future__ import annotations

from dataclasses import dataclass

from loadtest.target import Target

# The class of requests that bring objectives of their own, as those of a sweep do.
_CLASS = "custom"


@dataclass(frozen=True, slots=True)
class Count:
    """Requests that ended, and those of them that were good."""

    requests: int
    good: int

    def since(self, earlier: Count) -> Count:
        return Count(self.requests - earlier.requests, self.good - earlier.good)


def read_count(target: Target) -> Count | None:
    """Of the server that `target` reaches, since its start; None if it keeps none (`GET /v1/slo` is ours alone)."""
    try:
        counted = target.get_json("/slo")["classes"].get(_CLASS, {"requests": 0, "good": 0})
        return Count(int(counted["requests"]), int(counted["good"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
