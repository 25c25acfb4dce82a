"""What crosses the wire comes back equal, and what a peer may not send is refused with the field it is in."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.keys import KEY_BYTES
from pdserve.errors import InvalidRequest
from pdserve.protocol import codec
from pdserve.protocol import worker_pb2 as pb
from pdserve.request import MAX_SEED, FinishReason, Grammar, SamplingParams

VOCAB = 100
FINITE = st.floats(allow_nan=False, allow_infinity=False)
UINT32 = st.integers(0, 2**32 - 1)


@given(
    st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 2**32 - 1),
        seed=st.integers(0, MAX_SEED),
        temperature=st.floats(0, allow_infinity=False),
        top_p=st.floats(0, 1, exclude_min=True),
        top_k=UINT32,
        min_tokens=UINT32,
        stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=VOCAB - 1).map(tuple),
        min_p=st.floats(0, 1),
        presence_penalty=FINITE,
        frequency_penalty=FINITE,
        repetition_penalty=st.floats(0, exclude_min=True, allow_infinity=False),
        logit_bias=st.lists(st.tuples(st.integers(0, VOCAB - 1), FINITE), max_size=9).map(tuple),
        logprobs=st.none() | st.integers(0, codec.MAX_LOGPROBS),
        prompt_logprobs=st.none() | st.integers(0, codec.MAX_LOGPROBS),
        grammar=st.none() | st.builds(Grammar, st.sampled_from(("json_schema", "regex", "lark")), st.text(max_size=9)),
    )
)
def test_sampling_comes_back_equal(sampling: SamplingParams) -> None:
    data = codec.sampling_to_proto(sampling).SerializeToString()
    assert codec.sampling_from_proto(pb.Sampling.FromString(data), VOCAB) == sampling


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_finish_reason_comes_back_equal(reason: FinishReason | None) -> None:
    assert codec.finish_from_proto(codec.finish_to_proto(reason)) is reason


def test_every_finish_of_the_protocol_has_its_reason() -> None:
    assert {codec.finish_from_proto(value) for value in pb.Finish.values()} == {None, *FinishReason}


def test_finish_of_a_newer_peer_counts_as_an_error() -> None:
    event = pb.TokenEvent.FromString(pb.TokenEvent(finish=99).SerializeToString())  # type: ignore[arg-type]
    assert codec.finish_from_proto(event.finish) is FinishReason.ERROR


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("seed", MAX_SEED + 1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", -1.0),
        ("top_p", 1.0000001),
        ("top_p", math.nan),
        ("stop_token_ids", [VOCAB]),
        ("stop_token_ids", [0, 2**32 - 1]),
        ("stop_token_ids", list(range(VOCAB))),
        ("stop_token_ids", [0] * 10_000),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("logit_bias", [pb.LogitBias(token_id=VOCAB)]),
        ("logit_bias", [pb.LogitBias(token_id=1, bias=math.nan)]),
        ("logit_bias", [pb.LogitBias(token_id=1)] * (codec.MAX_LOGIT_BIAS + 1)),
        ("logprobs", codec.MAX_LOGPROBS + 1),
        ("grammar", pb.Grammar(kind="gbnf", source="root ::= 1")),
        ("grammar", pb.Grammar(kind="regex", source="a" * (codec.MAX_GRAMMAR_BYTES + 1))),
    ],
)
def test_sampling_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    good = codec.sampling_to_proto(SamplingParams(max_tokens=1, seed=0))
    codec.sampling_from_proto(good, VOCAB)
    if isinstance(value, list | pb.Grammar):
        good.MergeFrom(pb.Sampling(**{field: value}))
    else:
        setattr(good, field, value)
    with pytest.raises(InvalidRequest) as caught:
        codec.sampling_from_proto(good, VOCAB)
    assert caught.value.param == field


def test_empty_message_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        codec.sampling_from_proto(pb.Sampling(), VOCAB)
    with pytest.raises(InvalidRequest):
        codec.check_submit(pb.Submit(), vocab_size=VOCAB, max_model_len=32)


def submit(**changes: Any) -> pb.Submit:
    good = {
        "prompt_token_ids": [1, 2, VOCAB - 1],
        "root_key": bytes(KEY_BYTES),
        "remaining_s": 1.0,
        "sampling": pb.Sampling(max_tokens=3),
    }
    return pb.Submit(**{**good, **changes})


@pytest.mark.parametrize(
    "changes",
    [{}, {"output_token_ids": [0, VOCAB - 1]}, {"prompt_token_ids": [5] * 31}, {"remaining_s": 1e-9}],
)
def test_submit_that_fits_is_accepted(changes: dict[str, Any]) -> None:
    codec.check_submit(submit(**changes), vocab_size=VOCAB, max_model_len=32)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt_token_ids": []}, "prompt"),
        ({"prompt_token_ids": [], "output_token_ids": [1]}, "prompt"),
        ({"prompt_token_ids": [5] * 32}, "prompt"),
        ({"prompt_token_ids": [5] * 30, "output_token_ids": [1, 2]}, "prompt"),
        ({"prompt_token_ids": [VOCAB]}, "prompt"),
        ({"output_token_ids": [2**32 - 1]}, "prompt"),
        ({"output_token_ids": [1, 2, 3]}, "output_token_ids"),
        ({"root_key": b""}, "root_key"),
        ({"root_key": bytes(KEY_BYTES + 1)}, "root_key"),
        ({"remaining_s": 0.0}, "remaining_s"),
        ({"remaining_s": -1.0}, "remaining_s"),
        ({"remaining_s": math.nan}, "remaining_s"),
        ({"remaining_s": math.inf}, "remaining_s"),
    ],
)
def test_submit_that_cannot_run_is_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        codec.check_submit(submit(**changes), vocab_size=VOCAB, max_model_len=32)
    assert caught.value.param == param
