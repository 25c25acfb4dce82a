"""One paragraph: which target wins, by how much, and what the others broke on."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.result import ATTAINMENT, Result, Sweep, common_rate
from loadtest.search import RESOLUTION
from loadtest.statistics import Point


def verdict(sweep: Sweep) -> str:
    ranked = sorted(sweep.results, key=lambda result: result.best_rps or 0.0, reverse=True)
    sentences = [_ranking(ranked), *map(_limit, ranked)]
    rate_rps = common_rate(ranked)
    if len(ranked) > 1 and rate_rps is not None:
        sentences.append(_compared(ranked, rate_rps))
    return " ".join(sentences)


def _ranking(ranked: Sequence[Result]) -> str:
    best, share = ranked[0], f"{ATTAINMENT:.0%} of requests good"
    if best.best_rps is None:
        return f"No rate that was tried had {share}."
    if len(ranked) == 1:
        return f"{best.name} holds {_rate(best.best_rps)} with at least {share}."
    second = ranked[1]
    if second.best_rps is None:
        return f"{best.name} wins: it holds {_rate(best.best_rps)} with at least {share}, the others no rate tried."
    ratio = best.best_rps / second.best_rps
    if ratio <= RESOLUTION:
        return (
            f"No winner: {best.name} and {second.name} hold {_rate(best.best_rps)} and {_rate(second.best_rps)} with at"
            f" least {share}, which is closer than this sweep resolves."
        )
    return (
        f"{best.name} wins: it holds {_rate(best.best_rps)} with at least {share},"
        f" {ratio:.2g} times the {_rate(second.best_rps)} of {second.name}."
    )


def _limit(result: Result) -> str:
    point = result.broken
    if point is None:
        return f"{result.name} held every rate it was given."
    shares = f"{point.ttft_share:.0%} met TTFT and {point.tpot_share:.0%} met TPOT"
    return f"{result.name} breaks on {_reason(point)}: at {_rate(point.rate_rps)} {shares}{_largest_stage(point)}."


def _reason(point: Point) -> str:
    if point.failed > (1 - ATTAINMENT) * point.requests:
        commonest = max(point.errors.items(), key=lambda item: item[1])[0]
        return f"requests that fail ({point.failed} of {point.requests}, such as: {commonest})"
    if abs(point.ttft_share - point.tpot_share) < 0.05:
        return "both objectives"
    return "TTFT" if point.ttft_share < point.tpot_share else "TPOT"


def _largest_stage(point: Point) -> str:
    """Only where TTFT is what was missed, and the server told its stages."""
    if not point.stages_s or point.ttft_share >= ATTAINMENT:
        return ""
    stage, seconds = max(point.stages_s.items(), key=lambda item: item[1])
    total_s = sum(point.stages_s.values())
    return f", and {stage} is {seconds / total_s:.0%} of a TTFT of {_seconds(total_s)}" if total_s > 0 else ""


def _compared(results: Sequence[Result], rate_rps: float) -> str:
    parts = [
        f"{result.name} has a median TTFT of {_seconds(point.ttft.p50_s)}, a median TPOT of"
        f" {_seconds(point.tpot.p50_s)} and {_seconds(point.longest_gaps_s)} as the mean of its longest 10 % of gaps"
        for result in results
        for point in (result.at(rate_rps),)
    ]
    return f"Given {_rate(rate_rps)}, {'; '.join(parts)}."


def _rate(rate_rps: float) -> str:
    return f"{rate_rps:.3g} req/s"


def _seconds(value_s: float) -> str:
    return f"{value_s:.2f} s" if value_s >= 1 else f"{value_s * 1e3:.3g} ms"
