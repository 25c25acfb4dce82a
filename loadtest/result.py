"""What a sweep found, for the report and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loadtest.search import highest_held
from loadtest.statistics import Point
from pdserve.slo import Slo

# A rate holds if this share of its requests is good.
ATTAINMENT = 0.9


@dataclass(frozen=True, slots=True)
class Alone:
    """One request at a time, in seconds. `cold_ttft_s` is of the first since the target was started or found; the
    others are the shortest of those after it: what else runs on a machine only adds to them."""

    cold_ttft_s: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """One target. `points` in rising order of rate; `closed` is the closed loop, if one was asked for."""

    name: str
    alone: Alone
    points: tuple[Point, ...]
    closed: Point | None = None

    @property
    def best_rps(self) -> float | None:
        """The highest rate that held."""
        return highest_held({point.rate_rps: held(point) for point in self.points})

    @property
    def broken(self) -> Point | None:
        """The lowest point that did not hold."""
        return next((point for point in self.points if not held(point)), None)

    def at(self, rate_rps: float) -> Point:
        return next(point for point in self.points if point.rate_rps == rate_rps)


@dataclass(frozen=True, slots=True)
class Sweep:
    """`settings` and `environment` are shown as they are; `slo_origin` says in words where the objectives are from."""

    workload: str
    slo: Slo
    slo_origin: str
    results: tuple[Result, ...]
    settings: Mapping[str, str]
    environment: Mapping[str, str]


def held(point: Point) -> bool:
    return point.good_share >= ATTAINMENT


def common_rate(results: Sequence[Result]) -> float | None:
    """Where to compare all: of the rates that all were given, the lowest at which one broke, else the highest."""
    shared = set.intersection(*({point.rate_rps for point in result.points} for result in results))
    broken = [rate_rps for rate_rps in shared if not all(held(result.at(rate_rps)) for result in results)]
    return min(broken, default=max(shared, default=None))
