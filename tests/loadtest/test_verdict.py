"""The verdict names the winner, the ratio, and what each target broke on; and claims no difference it cannot see."""

from __future__ import annotations

from loadtest.verdict import verdict
from tests.support.outcomes import holding, late, rejecting, slow, sweep


def test_winner_with_ratio_and_reasons() -> None:
    text = verdict(
        sweep(mixed=[holding(1.0), slow(2.0)], disaggregated=[holding(1.0), holding(2.0), late(4.0)]),
    )
    assert text.startswith("disaggregated wins: it holds 2 req/s")
    assert "2 times the 1 req/s of mixed" in text
    assert "mixed breaks on TPOT: at 2 req/s 100% met TTFT and 25% met TPOT." in text
    assert "disaggregated breaks on TTFT: at 4 req/s 25% met TTFT and 100% met TPOT, and queue is 75%" in text
    assert "Given 2 req/s, disaggregated has a median TTFT of 500 ms" in text


def test_compared_at_the_lowest_rate_that_all_were_given_and_one_missed() -> None:
    text = verdict(
        sweep(
            mixed=[holding(1.0), slow(1.2), slow(1.4), slow(2.0)],
            disaggregated=[holding(1.0), holding(1.4), late(2.0)],
        ),
    )
    assert "mixed breaks on TPOT: at 1.2 req/s" in text
    assert "Given 1.4 req/s" in text


def test_what_is_closer_than_the_resolution_is_no_win() -> None:
    text = verdict(sweep(mixed=[holding(2.0), late(4.0)], disaggregated=[holding(2.2), late(4.0)]))
    assert text.startswith("No winner: disaggregated and mixed hold 2.2 req/s and 2 req/s")


def test_one_target_has_a_limit_and_no_opponent() -> None:
    text = verdict(sweep(endpoint=[holding(1.0), rejecting(2.0)]))
    assert text.startswith("endpoint holds 1 req/s")
    assert "breaks on requests that fail (5 of 20, such as: HTTP 503: busy)" in text
    assert "Given" not in text


def test_nothing_held() -> None:
    assert verdict(sweep(mixed=[late(1.0)], other=[slow(1.0)])).startswith("No rate that was tried")


def test_only_one_held() -> None:
    text = verdict(sweep(mixed=[late(1.0)], other=[holding(1.0)]))
    assert text.startswith("other wins: it holds 1 req/s")
    assert "the others no rate" in text
    assert "other held every rate it was given." in text
