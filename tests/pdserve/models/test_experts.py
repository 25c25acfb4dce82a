"""The grouped product that a GPU computes a mixture of experts by, against one product an expert."""

from __future__ import annotations

import pytest
import torch

from pdserve.models.experts import _grouped, _in_one_product


@pytest.mark.parametrize("counts", [(3, 0, 5, 1), (0, 0, 0, 9), (9, 0, 0, 0), (0, 4, 5, 0), (2, 2, 2, 3)])
def test_each_expert_has_its_rows(counts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(sum(counts), 64, generator=generator).to(torch.bfloat16)
    weight = torch.randn(len(counts), 96, 64, generator=generator).to(torch.bfloat16)
    ends = torch.tensor(counts).cumsum(0).int()
    torch.testing.assert_close(_in_one_product(x, weight, ends), _grouped(x, weight, ends), rtol=0.02, atol=0.05)
