"""What a run comes to, as one point of the goodput curve. Rejected and failed requests count in every share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from loadtest.live import Count
from loadtest.run import Run
from pdserve.slo import Slo

NAN = float("nan")
# Of a curve that a report draws: the percentiles 0, 1, ... 100.
CDF_POINTS = 101
LONGEST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one quantity in seconds; NaN throughout if there was none. `cdf`: percentiles 0, 1, ... 100."""

    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    cdf_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One rate, one target.

    Attributes:
        rate_rps: asked for; `offered_rps` is what the arrivals came to.
        goodput_rps: good requests by the time in which they were sent.
        server_good_share: the same share by the server's live count; None if it keeps none.
        longest_gaps_s: mean of the longest 10 % of all gaps.
        stages_s: mean seconds by stage of the TTFT, of the requests the server gave an account of.
        handoff_s: likewise of the first gap.
        client_cores: CPU time of the load client over the run's time.
        late_p99_s: how much later than due requests were sent.
    """

    rate_rps: float
    offered_rps: float
    requests: int
    failed: int
    errors: Mapping[str, int]
    good_share: float
    ttft_share: float
    tpot_share: float
    goodput_rps: float
    server_good_share: float | None
    output_tokens_per_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft: Spread
    tpot: Spread
    gap: Spread
    e2e: Spread
    longest_gaps_s: float
    stages_s: Mapping[str, float]
    handoff_s: Mapping[str, float]
    client_cores: float
    late_p99_s: float


def summarise(run: Run, slo: Slo, rate_rps: float, live: Count | None = None) -> Point:
    """`live`: what the server counted meanwhile."""
    outcomes = run.outcomes
    ok = [outcome for outcome in outcomes if outcome.ok]
    gaps_s = [gap_s for outcome in ok for gap_s in outcome.gaps_s]
    servers = [outcome.server for outcome in ok if outcome.server is not None]
    good = sum(outcome.good(slo) for outcome in outcomes)
    total = max(len(outcomes), 1)
    output_tokens = sum(outcome.output_tokens for outcome in ok)
    return Point(
        rate_rps=rate_rps,
        offered_rps=len(outcomes) / run.offered_s,
        requests=len(outcomes),
        failed=len(outcomes) - len(ok),
        errors=_counted(outcome.error for outcome in outcomes if not outcome.ok),
        good_share=good / total,
        ttft_share=sum(outcome.meets_ttft(slo) for outcome in outcomes) / total,
        tpot_share=sum(outcome.meets_tpot(slo) for outcome in outcomes) / total,
        goodput_rps=good / run.offered_s,
        server_good_share=live.good / live.requests if live is not None and live.requests else None,
        output_tokens_per_s=output_tokens / run.elapsed_s,
        prompt_tokens=sum(outcome.prompt_tokens for outcome in ok),
        cached_tokens=sum(outcome.cached_tokens for outcome in ok),
        output_tokens=output_tokens,
        ttft=spread([outcome.ttft_s for outcome in ok if outcome.ttft_s is not None]),
        tpot=spread([outcome.tpot_s for outcome in ok if outcome.tpot_s is not None]),
        gap=spread(gaps_s),
        e2e=spread([outcome.e2e_s for outcome in ok]),
        longest_gaps_s=mean_of_longest(gaps_s),
        stages_s=means([server.stages for server in servers]),
        handoff_s=means([server.handoff for server in servers if server.handoff]),
        client_cores=run.client_cpu_s / run.elapsed_s,
        late_p99_s=percentile(sorted(outcome.late_s for outcome in outcomes), 0.99),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank, of values in rising order; NaN of none."""
    if not ordered:
        return NAN
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Iterable[float]) -> Spread:
    ordered = sorted(values)
    cdf = tuple(percentile(ordered, number / (CDF_POINTS - 1)) for number in range(CDF_POINTS))
    mean = fmean(ordered) if ordered else NAN
    return Spread(mean, percentile(ordered, 0.5), percentile(ordered, 0.9), percentile(ordered, 0.99), cdf)


def mean_of_longest(values: Sequence[float], share: float = LONGEST_SHARE) -> float:
    """The mean of the longest share of them, one at least; NaN of none."""
    longest = sorted(values, reverse=True)[: max(1, round(share * len(values)))]
    return fmean(longest) if longest else NAN


def means(accounts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean by key, in the order of first appearance; a key that one lacks counts as 0 there."""
    keys = dict.fromkeys(key for account in accounts for key in account)
    return {key: fmean(account.get(key, 0.0) for account in accounts) for key in keys}


def _counted(errors: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for error in errors:
        counts[error] = counts.get(error, 0) + 1
    return counts
