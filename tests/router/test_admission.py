"""A request is refused if what is before it makes it miss its class, told when to come back, and that is checked."""

from __future__ import annotations

import pytest

from pdserve.errors import Overloaded, TenantOverQuota
from pdserve.timeline import Timeline
from router.admission import LONGEST_RETRY_S, Confidence, Forecast, Mode, judge, no_place, refusal
from router.predictor import Correction, Misses, Predictor
from router.refusals import RefusalLedger
from router.slo import CLASSES

STANDARD = CLASSES["standard"]  # TTFT 4 s


def forecast(prompts_s: float = 0.0, decode_s: float = 0.0, compute_s: float = 0.5, margin_s: float = 0.0) -> Forecast:
    return Forecast(0.1, prompts_s, decode_s, compute_s, tpot_s=0.1, margin_s=margin_s)


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (forecast(), None),
        (forecast(prompts_s=3.3), None),
        (forecast(prompts_s=3.5), "ttft"),
        (forecast(decode_s=3.5), "tpot"),
        (forecast(prompts_s=9.0, decode_s=3.5), "ttft"),
        (forecast(prompts_s=3.0, margin_s=0.5), "ttft"),
        (forecast(compute_s=3.8, margin_s=0.5), None),  # nobody is before it
        (forecast(prompts_s=9.0, compute_s=4.0), None),  # late on an idle fleet too: no retry would help
    ],
)
def test_the_objective_that_is_missed(seen: Forecast, reason: str | None) -> None:
    assert judge(STANDARD, seen, Mode.ENFORCE).reason == reason


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (forecast(prompts_s=2.8, compute_s=1.0), None),  # it would miss its second alone, and meets `standard`
        (forecast(prompts_s=3.0, compute_s=1.0), "ttft"),  # a retry can spare it the wait
        (forecast(prompts_s=3.0, compute_s=5.0), None),
        (forecast(prompts_s=116.0, compute_s=5.0), "ttft"),
        (forecast(prompts_s=300.0, compute_s=200.0), None),  # there is no class that it could meet
    ],
)
def test_what_misses_its_class_alone_is_judged_by_the_next_that_it_meets(seen: Forecast, reason: str | None) -> None:
    verdict = judge(CLASSES["interactive"], seen, Mode.ENFORCE)
    assert verdict.reason == reason
    assert not verdict.refused or verdict.retry_after_s >= 1


def test_in_shadow_nothing_is_refused() -> None:
    shadow, enforced = (judge(STANDARD, forecast(prompts_s=9.0), mode) for mode in (Mode.SHADOW, Mode.ENFORCE))
    assert shadow.reason == enforced.reason == "ttft"
    assert enforced.refused
    assert not shadow.refused


def test_the_client_is_told_why_and_when_to_come_back() -> None:
    verdict = judge(STANDARD, forecast(prompts_s=9.0), Mode.ENFORCE)
    error = refusal(verdict, STANDARD)
    assert (error.status, error.code, error.retry_after_s) == (503, "slo_ttft", 6)
    assert "9.6 s instead of 4 s" in error.message
    by_the_next = judge(CLASSES["interactive"], forecast(prompts_s=9.0, compute_s=1.5), Mode.ENFORCE)
    assert "instead of 4 s" in refusal(by_the_next, CLASSES["interactive"]).message
    assert refusal(judge(STANDARD, forecast(decode_s=9.0), Mode.ENFORCE), STANDARD).code == "slo_tpot"
    assert judge(STANDARD, forecast(prompts_s=1e9), Mode.ENFORCE).retry_after_s == LONGEST_RETRY_S


def test_the_more_are_refused_the_surer_one_has_to_be() -> None:
    confidence = Confidence()
    assert confidence.share == 0.5
    shares = []
    for refused in [False] * 64 + [True] * 64:
        confidence.decided(refused)
        shares.append(confidence.share)
    assert shares == sorted(shares)
    assert shares[63] == 0.5
    assert shares[-33] == shares[-1] == pytest.approx(0.9)  # half of them refused: there is always another
    for _ in range(64):
        confidence.decided(False)
    assert confidence.share == 0.5


def test_the_margin_is_what_forecasts_were_off_by_in_as_many_as_wanted() -> None:
    misses, seen = Misses(), forecast(prompts_s=1.5, compute_s=0.5)  # 2.1 s with what it has waited
    assert misses.margin_s(seen, 0.9) == 0.0  # nothing is known yet
    for late in range(10):
        misses.note(seen, 2.1 + 0.1 * late)
    assert misses.margin_s(seen, 0.5) == pytest.approx(0.5)
    assert misses.margin_s(seen, 0.9) == pytest.approx(0.9)
    # Four times as much before it errs twice as much; one behind nobody errs by its own alone.
    assert misses.margin_s(forecast(prompts_s=7.5, compute_s=0.5), 0.9) == pytest.approx(1.8)
    assert misses.margin_s(forecast(prompts_s=0.0, compute_s=0.5), 0.9) == pytest.approx(0.45)
    for _ in range(64):
        misses.note(seen, 0.5)
    assert misses.margin_s(seen, 0.9) == 0.0  # sooner than foreseen is no reason to take what will be late


def test_a_full_queue_is_503_and_a_greedy_tenant_429() -> None:
    full, greedy = no_place("queue_full"), no_place("tenant_share")
    assert (full.status, full.code) == (503, "queue_full")
    assert (greedy.status, greedy.code, greedy.type) == (429, "tenant_share", "rate_limit_error")
    assert isinstance(greedy, TenantOverQuota)
    assert isinstance(greedy, Overloaded)


def test_refusals_are_checked_for_what_could_have_been_served() -> None:
    ledger = RefusalLedger()
    for slo in ("interactive", "standard"):
        ledger.turned_away(CLASSES[slo], "ttft", due_s=5.0)
    ledger.look(1.0, lambda slo: False)
    assert not ledger.checked
    ledger.look(2.0, lambda slo: slo is STANDARD)
    assert ledger.checked == {("refused", "wrong"): 1}
    ledger.look(5.1, lambda slo: False)
    assert ledger.checked == {("refused", "wrong"): 1, ("refused", "right"): 1}
    assert not ledger.watching


def test_what_is_watched_is_bounded() -> None:
    ledger = RefusalLedger()
    for _ in range(3000):
        ledger.turned_away(STANDARD, "ttft", due_s=5.0)
    ledger.look(6.0, lambda slo: False)
    assert ledger.checked["refused", "right"] <= 1024
    assert sum(ledger.checked.values()) == 3000


def test_verdicts_on_requests_that_ran_are_right_or_wrong() -> None:
    ledger = RefusalLedger()
    for condemned in (False, True):
        for good in (False, True):
            ledger.ran(condemned, good)
    assert ledger.describe()["checked"] == {
        "refused_right": 1,
        "refused_wrong": 1,
        "taken_right": 1,
        "taken_wrong": 1,
    }


def test_a_lasting_error_of_the_model_is_corrected_and_an_outlier_is_not() -> None:
    correction = Correction()
    for _ in range(200):
        correction.note(1.0 * correction.factor, 2.0)
    correction.note(1.0 * correction.factor, 500.0)
    assert correction.factor == pytest.approx(2.0)
    for nonsense in ((0.0, 1.0), (1.0, 0.0)):
        correction.note(*nonsense)
    assert correction.factor == pytest.approx(2.0)


def test_errors_are_those_of_the_forecast_made_when_the_request_came() -> None:
    predictor, timeline = Predictor(), Timeline(received_s=0.0, tokenised_s=0.05, dispatched_s=0.1)
    timeline.token(1.2)
    timeline.token(1.4)
    predictor.note(forecast(prompts_s=0.0, compute_s=0.5), timeline)
    assert predictor.errors["ttft"].quantile(0.5) == pytest.approx(0.5)  # 0.6 s foreseen
    assert predictor.errors["tpot"].quantile(0.5) == pytest.approx(0.5)
    assert predictor.stay_s == pytest.approx(0.2)
