"""Both samplers agree with a plain float64 one and with each other; a choice depends on logits, parameters, seed and
index alone."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pdserve.engine import native_sampler
from pdserve.engine.sampler import Sampled, Sampler, SamplingRow, uniform
from pdserve.engine.token_counts import TokenCounts
from pdserve.engine.torch_sampler import TorchSampler, adjusted
from pdserve.request import SamplingParams

BASE = SamplingParams(max_tokens=100, seed=1)
INF = math.inf
T = TypeVar("T")

SAMPLERS: dict[str, Sampler] = {"torch": TorchSampler()}
if shutil.which("g++") is not None:
    SAMPLERS["native"] = native_sampler.load(1)


@pytest.fixture(scope="module", params=list(SAMPLERS))
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return SAMPLERS[request.param]


def choose(sampler: Sampler, logits: NDArray[np.float32] | list[float], params: SamplingParams, index: int = 0) -> int:
    return sampler.choose(torch.tensor(np.asarray(logits, np.float32))[None], [SamplingRow(params, index)])[0]


def oracle(logits: NDArray[np.float32], params: SamplingParams) -> dict[int, float]:
    """Probability of each token that may be chosen, in the order of the cumulative distribution."""
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - float(logits.max())) / max(params.temperature, 1e-6)
    by_value = np.argsort(-scaled, kind="stable")
    cut = params.top_p < 1 or 0 < params.top_k < len(scaled)
    order = by_value if cut else np.arange(len(scaled))
    if params.min_p > 0:
        order = order[np.exp(scaled[order] - scaled.max()) >= params.min_p]
    if 0 < params.top_k < len(scaled):
        order = order[: params.top_k]
    weights = np.exp(scaled[order])
    if params.top_p < 1:
        before = np.cumsum(weights) - weights
        order = order[before < params.top_p * weights.sum()]
        weights = weights[: len(order)]
    return dict(zip(order.tolist(), (weights / weights.sum()).tolist(), strict=True))


def agrees(sampler: Sampler, logits: NDArray[np.float32], params: SamplingParams, index: int = 0) -> bool:
    """The choice stands where u falls in the oracle's distribution; rounding may move a boundary, top_p's too."""
    token, u, slack = choose(sampler, logits, params, index), uniform(params.seed, index), 2e-5
    for factor in (1.0, 1 - 1e-6, 1 + 1e-6) if params.top_p < 1 else (1.0,):
        before = 0.0
        for candidate, probability in oracle(logits, replace(params, top_p=params.top_p * factor)).items():
            if candidate == token and before - slack <= u <= before + probability + slack:
                return True
            before += probability
    return False


# --- the counter -----------------------------------------------------------------------------------------------------


def test_uniform_is_a_pure_function_with_golden_values() -> None:
    assert [uniform(1, 0), uniform(1, 1), uniform(2, 0), uniform(2**63 - 1, 2**32)] == [
        0.6487508310490744,
        0.20798701980113665,
        0.46626269424065014,
        0.08465327718526017,
    ]


def test_uniform_is_uniform_over_seeds_and_over_indices() -> None:
    for values in ([uniform(7, i) for i in range(20_000)], [uniform(i, 7) for i in range(20_000)]):
        assert all(0.0 <= value < 1.0 for value in values)
        counts = np.histogram(values, bins=50, range=(0, 1))[0]
        chi_square = float(((counts - 400) ** 2 / 400).sum())
        assert chi_square < 49 + 6 * math.sqrt(2 * 49)
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


# --- the distribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        BASE,
        replace(BASE, temperature=0.5),
        replace(BASE, temperature=3.0),
        replace(BASE, top_k=5),
        replace(BASE, top_p=0.7),
        replace(BASE, min_p=0.1),
        replace(BASE, min_p=0.05, top_p=0.8, top_k=10, temperature=1.5),
        replace(BASE, top_k=8, top_p=0.6, temperature=1.3),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_oracle(sampler: Sampler, params: SamplingParams) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 24).astype(np.float32)
    draws = 6000
    rows = [SamplingRow(replace(params, seed=3), index) for index in range(draws)]
    counts = np.bincount(sampler.choose(torch.tensor(logits).repeat(draws, 1), rows), minlength=24)
    expected = np.zeros(24)
    for token, probability in oracle(logits, params).items():
        expected[token] = probability * draws
    assert (counts[expected == 0] == 0).all()
    likely = expected > 5
    chi_square = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    assert chi_square < likely.sum() + 6 * math.sqrt(2 * likely.sum())


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**63 - 1),
    size=st.sampled_from((1, 2, 7, 60, 600, 1500)),
    spread=st.sampled_from((0.0, 1e-3, 1.0, 5.0, 1e4)),
    decimals=st.sampled_from((0, 1, 6)),  # few decimals make ties
    masked=st.sampled_from((0.0, 0.3, 0.95)),
    temperature=st.sampled_from((1e-9, 1e-3, 0.7, 1.0, 2.0, 100.0)),
    top_p=st.sampled_from((1e-300, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)),
    top_k=st.sampled_from((0, 1, 2, 50, 599, 2**32 - 1)),
)
def test_every_choice_is_the_oracles(
    sampler: Sampler,
    seed: int,
    size: int,
    spread: float,
    decimals: int,
    masked: float,
    temperature: float,
    top_p: float,
    top_k: int,
) -> None:
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(0, 1, size) * spread, decimals).astype(np.float32)
    logits[rng.random(size) < masked] = -INF
    logits[rng.integers(size)] = spread
    assert agrees(sampler, logits, replace(BASE, seed=seed, temperature=temperature, top_p=top_p, top_k=top_k))


def test_flat_distribution_over_a_large_vocabulary_is_cut_in_order_of_token_id(sampler: Sampler) -> None:
    """More than the first look: 49,152 equal logits, of which top_p keeps the first tenth."""
    logits = np.zeros(49_152, np.float32)
    tokens = {choose(sampler, logits, replace(BASE, top_p=0.1), index) for index in range(200)}
    assert max(tokens) < 4_916
    assert max(tokens) > 4_000


# --- ends of the ranges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        replace(BASE, temperature=0.0),
        replace(BASE, temperature=0.0, top_k=3, top_p=0.1),
        replace(BASE, top_k=1),
        replace(BASE, top_k=1, temperature=100.0),
        replace(BASE, top_p=1e-300),
        replace(BASE, top_p=1e-9, temperature=100.0, top_k=50),
        replace(BASE, temperature=1e-9),
        replace(BASE, temperature=5e-324),
    ],
    ids=str,
)
def test_parameters_that_leave_one_token_are_greedy(sampler: Sampler, params: SamplingParams) -> None:
    rng = np.random.default_rng(5)
    for index in range(50):
        logits = rng.normal(0, 3, 200).astype(np.float32)
        assert choose(sampler, logits, replace(params, seed=index), index) == int(logits.argmax())


@pytest.mark.parametrize("params", [replace(BASE, temperature=0.0), replace(BASE, top_k=1), replace(BASE, top_p=1e-12)])
def test_first_of_equal_tokens_wins_when_one_is_left(sampler: Sampler, params: SamplingParams) -> None:
    assert choose(sampler, [1, 5, 2, 5, 5], params) == 1


@pytest.mark.parametrize("top_k", [0, 2, 3])
@pytest.mark.parametrize("top_p", [0.5, 0.99, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1.0, 100.0])
def test_masked_tokens_are_never_chosen_and_an_infinite_one_always(
    sampler: Sampler, temperature: float, top_p: float, top_k: int
) -> None:
    params = replace(BASE, temperature=temperature, top_p=top_p, top_k=top_k)
    for index in range(30):
        assert choose(sampler, [-INF, 1.0, -INF, 1.1, -INF], params, index) in (1, 3)
        assert choose(sampler, [-INF, 1e38, INF, -1e38, 3.4028235e38], params, index) == 2
        assert choose(sampler, [-3.4e38, 3.4e38, -INF], params, index) == 1


@pytest.mark.parametrize(
    "params", [BASE, replace(BASE, top_k=2), replace(BASE, top_p=0.5), replace(BASE, temperature=0.0)]
)
@pytest.mark.parametrize("value", [-INF, INF, math.nan])
def test_row_without_a_finite_logit_does_not_break_the_batch(
    sampler: Sampler, params: SamplingParams, value: float
) -> None:
    bad, good = torch.full((1, 6), value), torch.tensor([[0.0, 0, 9, 0, 0, 0]])
    rows = [SamplingRow(params, 0), SamplingRow(replace(BASE, top_k=1), 0)]
    token, other = sampler.choose(torch.cat((bad, good)), rows)
    assert 0 <= token < 6
    assert other == 2


def test_top_k_is_applied_before_top_p(sampler: Sampler) -> None:
    """0.4 0.3 0.2 0.1: of the first two, renormalised, the first alone reaches 0.5; of all four it takes two."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    both = {choose(sampler, logits, replace(BASE, top_k=2, top_p=0.5), index) for index in range(200)}
    alone = {choose(sampler, logits, replace(BASE, top_p=0.5), index) for index in range(200)}
    assert (both, alone) == ({0}, {0, 1})


# --- stop tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_tokens_cannot_come_before_min_tokens(sampler: Sampler, temperature: float) -> None:
    params = replace(BASE, temperature=temperature, min_tokens=3, stop_token_ids=(1, 1, 4))
    logits = [0.0, 20.0, 1.0, 0.5, 19.0]
    assert all(
        choose(sampler, logits, replace(params, seed=seed), index) in (0, 2, 3)
        for index in range(3)
        for seed in range(20)
    )
    assert all(
        choose(sampler, logits, replace(params, seed=seed), index) in (1, 4) for index in (3, 9) for seed in range(20)
    )


def test_masking_one_row_leaves_the_others_alone(sampler: Sampler) -> None:
    masked = replace(BASE, temperature=0.0, min_tokens=2, stop_token_ids=(1,))
    rows = [SamplingRow(masked, 0), SamplingRow(replace(masked, min_tokens=0), 0), SamplingRow(masked, 2)]
    assert sampler.choose(torch.tensor([[0.0, 9, 1]]).repeat(3, 1), rows) == [2, 1, 1]


# --- bias and penalties ----------------------------------------------------------------------------------------------


def counts_of(prompt: list[int], output: list[int]) -> TokenCounts:
    counts = TokenCounts(prompt)
    counts.follow(output)
    return counts


def plainly_adjusted(logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """In plain Python, as the parameters are documented."""
    result = list(logits)
    for token_id, bias in params.logit_bias:
        result[token_id] += bias
    for token_id in {*prompt, *output}:
        value = result[token_id]
        value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * output.count(token_id)
        result[token_id] = value - params.presence_penalty * (token_id in output)
    return result


PENALISING = st.builds(
    SamplingParams,
    max_tokens=st.just(9),
    seed=st.integers(0, 5),
    temperature=st.sampled_from((0.0, 1.0)),
    presence_penalty=st.sampled_from((0.0, -2.0, 1.5)),
    frequency_penalty=st.sampled_from((0.0, 2.0, -1.0)),
    repetition_penalty=st.sampled_from((1.0, 0.5, 1.7)),
    logit_bias=st.lists(st.tuples(st.integers(0, 7), st.floats(-9, 9)), max_size=3, unique_by=lambda each: each[0]).map(
        tuple
    ),
)


@settings(max_examples=200)
@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=8, max_size=8),
    params=PENALISING,
    prompt=st.lists(st.integers(0, 7), max_size=6),
    output=st.lists(st.integers(0, 7), max_size=40),
)
def test_bias_and_penalties_are_those_of_a_plain_computation(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]
) -> None:
    row = SamplingRow(params, len(output), counts_of(prompt, output))
    found = adjusted(torch.tensor(logits), row).numpy()
    np.testing.assert_allclose(found, plainly_adjusted(logits, params, prompt, output), rtol=1e-4, atol=1e-4)


@given(prompt=st.lists(st.integers(0, 9)), output=st.lists(st.integers(0, 30), max_size=90), data=st.data())
def test_counts_that_follow_in_steps_equal_those_of_the_whole(
    prompt: list[int], output: list[int], data: st.DataObject
) -> None:
    counts = TokenCounts(prompt)
    for end in sorted(data.draw(st.lists(st.integers(0, len(output)), max_size=5))):
        counts.follow(output[:end])
    counts.follow(output)
    found = dict(zip(counts.token_ids.tolist(), counts.in_output.tolist(), strict=True))
    assert found == {token_id: output.count(token_id) for token_id in {*prompt, *output}}


# --- logprobs --------------------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own_whatever_the_parameters(sampler: Sampler) -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    params = replace(BASE, logprobs=2, logit_bias=((3, 100.0),), temperature=0.3, top_k=1)
    [sampled] = sampler.sample(torch.tensor(logits)[None] + 5, [SamplingRow(params, 0)])
    assert sampled.token_id == 3
    assert sampled.logprobs is not None
    assert (sampled.logprobs.rank, sampled.logprobs.top_ids) == (4, (0, 1))
    np.testing.assert_allclose(
        [sampled.logprobs.logprob, *sampled.logprobs.top_logprobs], np.log([0.1, 0.4, 0.3]), atol=1e-5
    )


def test_each_row_tells_as_many_logprobs_as_it_asked_for(sampler: Sampler) -> None:
    logits = torch.tensor(np.random.default_rng(1).normal(0, 2, (4, 30)).astype(np.float32))
    asked = (None, 0, 5, 1)
    rows = [SamplingRow(replace(BASE, logprobs=count, temperature=0.0), 0) for count in asked]
    exact = torch.log_softmax(logits.double(), -1)
    for i, (sampled, count) in enumerate(zip(sampler.sample(logits, rows), asked, strict=True)):
        told = sampled.logprobs
        assert (told is None) == (count is None)
        if told is not None:
            assert told.rank == 1
            assert told.logprob == pytest.approx(float(exact[i].max()), abs=1e-5)
            assert told.top_ids == tuple(exact[i].argsort(descending=True)[: count or 0].tolist())


# --- the batch -------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(data=st.data())
def test_row_is_chosen_the_same_alone_and_in_any_batch(sampler: Sampler, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    logits = torch.tensor(rng.normal(0, 2, (count, 700)).astype(np.float32))
    kinds = st.builds(
        SamplingParams,
        max_tokens=st.just(9),
        seed=st.integers(0, 5),
        temperature=st.sampled_from((0.0, 0.8, 1.0)),
        top_p=st.sampled_from((0.5, 0.95, 1.0)),
        top_k=st.sampled_from((0, 1, 40)),
        min_p=st.sampled_from((0.0, 0.2)),
        logit_bias=st.sampled_from(((), ((3, 5.0), (4, -100.0)))),
        logprobs=st.sampled_from((None, 0, 3)),
        frequency_penalty=st.sampled_from((0.0, 0.7)),
        repetition_penalty=st.sampled_from((1.0, 1.3)),
        min_tokens=st.integers(0, 3),
        stop_token_ids=st.sampled_from(((), (0, 5, 699))),
    )
    seen = counts_of([1, 2, 3, 3], [5, 5, 6])
    rows = [SamplingRow(data.draw(kinds), data.draw(st.integers(0, 5)), seen) for _ in range(count)]
    alone = [sampler.sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    order = data.draw(st.permutations(range(count)))
    assert sampler.sample(logits[list(order)], [rows[i] for i in order]) == [alone[i] for i in order]


@pytest.mark.parametrize(
    "params", [BASE, replace(BASE, top_k=4), replace(BASE, top_p=0.99)], ids=["all", "top_k", "top_p"]
)
def test_ends_of_the_unit_interval_choose_a_token_that_has_mass(
    sampler: Sampler, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    for u, expected in ((0.0, 1), (1 - 2.0**-53, 2)):
        for module in ("torch_sampler", "native_sampler"):
            monkeypatch.setattr(f"pdserve.engine.{module}.uniform", lambda seed, index, u=u: u)
        assert choose(sampler, [-INF, 3.0, 3.0, -INF, -INF], params) == expected


# --- both samplers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedMask:
    mask: bytes | None

    def allowed(self) -> bytes | None:
        return self.mask


def any_row(rng: np.random.Generator, vocab: int) -> SamplingRow:
    """Any mix of parameters, every second time each of them."""

    def one_of(usual: T, *others: T) -> T:
        return usual if rng.random() < 0.5 else others[rng.integers(len(others))]

    some = tuple(sorted({int(token) for token in rng.integers(vocab, size=5)}))
    params = SamplingParams(
        max_tokens=99,
        seed=int(rng.integers(2**62)),
        temperature=one_of(1.0, 0.0, 0.3, 1.7, 50.0, 1e-7),
        top_k=one_of(0, 1, 3, 50, 600, 10**6),
        top_p=one_of(1.0, 0.9, 0.5, 0.999, 1e-9),
        min_p=one_of(0.0, 0.1, 1e-4, 1.0),
        presence_penalty=one_of(0.0, 0.7, -2.0),
        frequency_penalty=one_of(0.0, 0.3, 2.0),
        repetition_penalty=one_of(1.0, 1.3, 0.7),
        logit_bias=one_of((), tuple((token, float(rng.normal(0, 5))) for token in some), ((some[0], -INF),)),
        min_tokens=one_of(0, 9),
        stop_token_ids=one_of((), some[:2], (*some, some[0])),
        logprobs=one_of(None, 0, min(5, vocab), min(20, vocab)),
    )
    counts = TokenCounts(rng.integers(vocab, size=int(rng.integers(1, 40))))
    counts.follow(rng.integers(vocab, size=int(rng.integers(30))).tolist())
    mask = rng.random(vocab) < rng.choice((0.001, 0.5, 1.0))
    mask[rng.integers(vocab)] = True
    allowed = one_of(None, mask.tobytes())
    index = int(rng.integers(20))
    return SamplingRow(params, index, counts if params.penalises else None, one_of(None, FixedMask(allowed)))


@pytest.mark.skipif(len(SAMPLERS) == 1, reason="needs g++")
@pytest.mark.parametrize("vocab", [1, 2, 15, 63, 64, 65, 700, 4097, 49_152])
def test_both_draw_the_same_tokens_and_tell_the_same_of_them(vocab: int) -> None:
    """Bit for bit, up to exponentials: of these rows none has its number so near a boundary."""
    rng = np.random.default_rng(vocab)
    natives = (SAMPLERS["native"], native_sampler.load(3))
    for _ in range(20 if vocab > 10_000 else 60):
        logits = torch.tensor((rng.normal(0, rng.choice((0.1, 3.0, 30.0)), (8, vocab))).astype(np.float32))
        logits = logits.round(decimals=1) if rng.random() < 0.3 else logits  # with ties
        logits[rng.integers(8), rng.integers(vocab, size=vocab // 2)] = -INF
        rows, before = [any_row(rng, vocab) for _ in range(8)], logits.clone()
        expected = SAMPLERS["torch"].sample(logits, rows)
        for native in natives:
            for row, one, other in zip(rows, native.sample(logits, rows), expected, strict=True):
                assert one.token_id == other.token_id, row
                check_told(one, other)
        assert torch.equal(logits, before)


def check_told(one: Sampled, other: Sampled) -> None:
    """Of equal logits any may be among the likeliest."""
    if one.logprobs is None or other.logprobs is None:
        assert one == other
        return
    assert one.logprobs.rank == other.logprobs.rank
    told = [(each.logprob, *each.top_logprobs) for each in (one.logprobs, other.logprobs)]
    np.testing.assert_allclose(*told, atol=2e-5, rtol=1e-6)
    distinct = len(set(other.logprobs.top_logprobs)) == len(other.logprobs.top_ids)
    assert not distinct or one.logprobs.top_ids[:-1] == other.logprobs.top_ids[:-1]


@pytest.mark.skipif(len(SAMPLERS) == 1, reason="needs g++")
def test_both_round_penalties_alike() -> None:
    """Coarse logits and penalties, so that the likeliest is decided by the last bit."""
    rng = np.random.default_rng(8)
    for _ in range(200):
        logits = torch.tensor(rng.integers(-20, 20, (4, 40)).astype(np.float32) / 10)
        params = replace(
            BASE,
            temperature=0.0,
            presence_penalty=rng.integers(-9, 9) / 10,
            frequency_penalty=rng.integers(-9, 9) / 10,
            repetition_penalty=rng.integers(5, 15) / 10,
            logit_bias=tuple((token, token / 10) for token in range(5)),
        )
        rows = [
            SamplingRow(params, 40, counts_of(rng.integers(40, size=20).tolist(), rng.integers(40, size=40).tolist()))
            for _ in range(4)
        ]
        assert SAMPLERS["native"].choose(logits, rows) == SAMPLERS["torch"].choose(logits, rows)


@pytest.mark.skipif(len(SAMPLERS) == 1, reason="needs g++")
@pytest.mark.parametrize(
    "row",
    [
        SamplingRow(replace(BASE, logit_bias=((40, 1.0),)), 0),
        SamplingRow(replace(BASE, logit_bias=((-1, 1.0),)), 0),
        SamplingRow(replace(BASE, min_tokens=1, stop_token_ids=(3, 2**40)), 0),
        SamplingRow(replace(BASE, presence_penalty=1.0), 0, TokenCounts([3, 40])),
        SamplingRow(BASE, 0, None, FixedMask(bytes(39))),
        SamplingRow(BASE, 0, None, FixedMask(bytes(41))),
    ],
    ids=["bias", "negative", "stop", "penalty", "short mask", "long mask"],
)
def test_what_reaches_outside_the_vocabulary_is_refused(row: SamplingRow) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        SAMPLERS["native"].choose(torch.zeros(2, 40), [SamplingRow(BASE, 0), row])


@pytest.mark.skipif(len(SAMPLERS) == 1, reason="needs g++")
@pytest.mark.parametrize(
    "logits", [torch.zeros(2, 9).double(), torch.zeros(9, 2).t(), torch.zeros(3, 9), torch.zeros(2, 9, device="meta")]
)
def test_logits_that_cannot_be_read_are_refused(logits: torch.Tensor) -> None:
    native = SAMPLERS["native"]
    for call in (lambda: native.choose(logits, [SamplingRow(BASE, 0)] * 2), lambda: native.describe(logits, [0, 1], 1)):
        with pytest.raises(ValueError, match="float32"):
            call()
    with pytest.raises(ValueError, match="vocabulary"):
        native.describe(torch.zeros(1, 9), [9], 0)
