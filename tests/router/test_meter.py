"""A tenant's limits hold whatever it does, and never keep it out for longer than they say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import TenantOverQuota
from pdserve.tenants import NOBODY, Tenant, TenantLimits
from router.meter import Meters


def tenant(**limits: int) -> Tenant:
    return Tenant("acme", limits=TenantLimits(**limits))


def test_without_limits_nothing_is_refused() -> None:
    meters = Meters()
    for _ in range(1000):
        meters.begin(NOBODY, 10**9, 0.0)


def test_running_requests_are_counted_until_they_end() -> None:
    meters, acme = Meters(), tenant(concurrent_requests=2)
    meters.begin(acme, 1, 0.0)
    meters.begin(acme, 1, 0.0)
    with pytest.raises(TenantOverQuota) as refused:
        meters.begin(acme, 1, 0.0)
    assert refused.value.code == "concurrent_requests"
    meters.begin(Tenant("other", limits=acme.limits), 1, 0.0)
    meters.end(acme, 0)
    meters.begin(acme, 1, 0.0)


def test_a_refusal_names_the_limit_and_when_it_is_over() -> None:
    meters, acme = Meters(), tenant(requests_per_minute=60)
    for _ in range(60):
        meters.begin(acme, 1, 0.0)
    with pytest.raises(TenantOverQuota, match="60 requests a minute") as refused:
        meters.begin(acme, 1, 0.0)
    assert refused.value.retry_after_s == 1
    meters.begin(acme, 1, 1.0)


def test_output_is_counted_when_it_is_there() -> None:
    meters, acme = Meters(), tenant(tokens_per_minute=60)
    meters.begin(acme, 20, 0.0)
    meters.end(acme, 100)  # 60 below zero
    with pytest.raises(TenantOverQuota, match="60 tokens a minute") as refused:
        meters.begin(acme, 1, 0.0)
    assert refused.value.retry_after_s == 61
    meters.begin(acme, 1, 61.0)


def test_a_prompt_above_the_limit_waits_for_a_full_bucket_and_no_longer() -> None:
    meters, acme = Meters(), tenant(tokens_per_minute=10)
    meters.begin(acme, 1000, 0.0)
    with pytest.raises(TenantOverQuota):
        meters.begin(acme, 1, 0.0)
    meters.begin(acme, 1, 60 * 100.0)


def test_a_limit_that_is_raised_or_set_later_counts_from_then() -> None:
    meters = Meters()
    for _ in range(100):
        meters.begin(tenant(), 1000, 0.0)
    meters.begin(tenant(requests_per_minute=1), 1, 0.0)
    with pytest.raises(TenantOverQuota):
        meters.begin(tenant(requests_per_minute=1), 1, 1.0)
    meters.begin(tenant(), 1, 1.0)


@given(
    st.integers(1, 20),
    st.integers(1, 200),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 100), st.integers(0, 100)), max_size=60),
)
def test_in_no_stretch_of_time_is_more_let_in_than_the_limits_say(
    requests: int, tokens: int, arrivals: list[tuple[float, int, int]]
) -> None:
    meters, acme = Meters(), tenant(requests_per_minute=requests, tokens_per_minute=tokens)
    now_s = 0.0
    prompt_tokens = output_tokens = 0
    for admitted, (gap_s, prompt, output) in enumerate(arrivals, 1):
        now_s += gap_s
        try:
            meters.begin(acme, prompt, now_s)
        except TenantOverQuota as refused:
            # After the wait that it names, the same request is let in: nothing is refused for ever.
            now_s += refused.retry_after_s
            meters.begin(acme, prompt, now_s)
        assert admitted <= requests * (1 + now_s / 60) + 1e-6
        # All but what the last request overdrew.
        assert prompt_tokens + output_tokens <= tokens * (1 + now_s / 60) + 1e-6
        prompt_tokens += prompt
        output_tokens += output
        meters.end(acme, output)
