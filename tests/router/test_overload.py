"""Under three times what can be served goodput stays what it was, and near capacity few are sent away: whole router,
simulated workers whose times vary as measured ones do, virtual time."""

from __future__ import annotations

import asyncio

import pytest

from router.admission import Mode
from tests.support.simulated_cluster import Machine, SimulatedCluster, Traffic
from tests.support.virtual_time import run_virtual

CALM = Machine()
NOISY = Machine(spread=0.35)
PROMPT_TOKENS = 400
CAPACITY_RPS = CALM.prefill_tokens_per_s / PROMPT_TOKENS
DURATION_S = 90.0


def traffic(machine: Machine, mode: Mode, times: float, seed: int = 0) -> tuple[Traffic, SimulatedCluster]:
    async def run() -> tuple[Traffic, SimulatedCluster]:
        cluster = SimulatedCluster(machine, mode, seed)
        await asyncio.sleep(0.1)  # links
        await cluster.arrivals(0.5 * CAPACITY_RPS, 20.0, PROMPT_TOKENS)  # the predictor learns
        found = await cluster.arrivals(times * CAPACITY_RPS, DURATION_S, PROMPT_TOKENS)
        await cluster.close()
        return found, cluster

    return run_virtual(run())


@pytest.mark.parametrize(("machine", "share", "few"), [(CALM, 0.85, 0.08), (NOISY, 0.75, 0.12)])
def test_goodput_does_not_collapse_and_near_capacity_few_are_refused(
    machine: Machine, share: float, few: float
) -> None:
    found = {times: traffic(machine, Mode.ENFORCE, times)[0] for times in (0.7, 1.0, 3.0)}
    for each in found.values():
        assert not each.failed
        assert each.slowest_refusal_s < 0.05
        assert each.served + each.refused == each.requests
    assert found[0.7].refused <= 0.03 * found[0.7].requests
    assert found[1.0].refused <= few * found[1.0].requests
    assert found[1.0].goodput_rps >= share * min(CAPACITY_RPS, found[1.0].requests / DURATION_S)
    assert found[3.0].goodput_rps >= 0.9 * max(each.goodput_rps for each in found.values())
    assert found[3.0].good >= 0.85 * found[3.0].served  # who is let in is served well


def test_without_enforcement_it_does_collapse() -> None:
    """Else the test above would show nothing."""
    enforced, off = (traffic(CALM, mode, 3.0)[0] for mode in (Mode.ENFORCE, Mode.OFF))
    assert off.goodput_rps < 0.5 * enforced.goodput_rps


def test_the_forecast_is_as_good_as_the_times_allow() -> None:
    _, cluster = traffic(CALM, Mode.ENFORCE, 3.0)
    errors = cluster.dispatcher.account.predictor.errors
    assert (errors["ttft"].quantile(0.5) or 1.0) < 0.15
    assert (errors["tpot"].quantile(0.9) or 1.0) < 0.2
    checked = cluster.dispatcher.feeder.ledger.checked
    assert checked["taken", "wrong"] <= 0.15 * checked["taken", "right"]


def test_a_simulated_run_repeats() -> None:
    assert traffic(NOISY, Mode.ENFORCE, 1.0)[0] == traffic(NOISY, Mode.ENFORCE, 1.0)[0]
