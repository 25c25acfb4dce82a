"""Sampling of many rows at once draws what the sampler of one row draws, in torch and in Triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pdserve.engine.device_sampler import Chooser, RowParams, choose_tokens, columns, plain
from pdserve.engine.sampler import SamplingRow
from pdserve.engine.torch_sampler import TorchSampler
from pdserve.request import SamplingParams

TRITON = importlib.util.find_spec("triton") is not None
VOCAB = 300

CASES = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
]


def drawn(choose: Chooser, logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    params = RowParams(*torch.from_numpy(columns(rows)))
    return [int(token) for token in choose(logits.clone(), params)]


def check(choose: Chooser, num_rows: int = 8) -> None:
    """Continuous logits, where no two rows' sums are at a boundary, and ones with many equal values."""
    generator = torch.Generator().manual_seed(0)
    for coarse in (False, True):
        logits = 3 * torch.randn(num_rows, VOCAB, generator=generator)
        logits = logits.round() if coarse else logits
        logits[-1, :250] = -torch.inf
        for case in CASES:
            rows = [SamplingRow(SamplingParams(max_tokens=9, seed=i, **case), i) for i in range(len(logits))]
            expected = TorchSampler().choose(logits, rows)
            assert drawn(choose, logits, rows) == expected, (case, coarse)


def test_torch_draws_what_the_sampler_of_one_row_draws() -> None:
    check(choose_tokens)


def test_rows_do_not_see_each_other() -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1))
    rows = [SamplingRow(SamplingParams(max_tokens=9, seed=i, **CASES[i + 1]), 3) for i in range(6)]
    together = drawn(choose_tokens, logits, rows)
    assert together == [drawn(choose_tokens, logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert together[::-1] == drawn(choose_tokens, logits.flip(0), rows[::-1])


@pytest.mark.skipif(not TRITON, reason="triton comes with torch's CUDA builds")
def test_triton_draws_the_same_interpreted() -> None:
    code = "from tests.pdserve.engine.test_device_sampler import check_triton; check_triton()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, timeout=250)
    assert done.returncode == 0, done.stderr.decode()


def check_triton() -> None:
    from pdserve.kernels import triton_sampler

    triton_sampler.BLOCK = 256  # two of them a row
    check(
        lambda logits, params: triton_sampler.choose_tokens(
            logits, params.temperature, params.top_k, params.top_p, params.min_p, params.uniform
        ),
        num_rows=2,
    )


@pytest.mark.parametrize(
    ("params", "is_plain"),
    [
        ({}, True),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1, "temperature": 0.7}, True),
        ({"logprobs": 0}, False),
        ({"logit_bias": ((3, 1.0),)}, False),
        ({"min_tokens": 5, "stop_token_ids": (2,)}, False),
        ({"min_tokens": 1, "stop_token_ids": (2,)}, True),
    ],
)
def test_what_needs_more_is_left_to_the_host(params: dict[str, object], is_plain: bool) -> None:
    row = SamplingRow(SamplingParams(max_tokens=9, seed=0, **params), 2)  # type: ignore[arg-type]
    assert plain(row) is is_plain
