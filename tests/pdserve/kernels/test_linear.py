"""`linear` is the matrix product that it says, for any shape, and a row's result does not depend on the other rows."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from pdserve.kernels.base import Kernels
from pdserve.kernels.reference import ReferenceKernels

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["reference", "native"], scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "reference":
        return ReferenceKernels()
    if shutil.which("g++") is None:
        pytest.skip("the native kernels need g++")
    from pdserve.kernels import native

    return native.load()


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def check(kernels: Kernels, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    expected = x.double() @ weight.double().t()
    if bias is not None:
        expected += bias.double()
    got = kernels.linear(x, weight, bias)
    assert got.dtype == x.dtype
    bound = TOLERANCE[x.dtype]
    torch.testing.assert_close(got.double(), expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 32, 33, 47, 64, 600, 769])
def test_rows(kernels: Kernels, rows: int, bias: bool, dtype: torch.dtype) -> None:
    size, depth = 96, 608
    weight = random(size, depth, dtype=dtype) * depth**-0.5
    check(kernels, random(rows, depth, dtype=dtype), weight, random(size, dtype=dtype) if bias else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize(("size", "depth"), [(32, 32), (960, 576), (64, 1536), (32, 4096), (33, 64), (64, 33), (1, 1)])
def test_sizes(kernels: Kernels, size: int, depth: int, rows: int, dtype: torch.dtype) -> None:
    check(kernels, random(rows, depth, dtype=dtype), random(size, depth, dtype=dtype) * depth**-0.5, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_dimensions_and_views(kernels: Kernels, dtype: torch.dtype) -> None:
    weight = random(64, 96, dtype=dtype) / 10
    check(kernels, random(2, 3, 96, dtype=dtype), weight, None)
    check(kernels, random(5, 192, dtype=dtype)[:, ::2], weight, None)
    check(kernels, random(5, 64, dtype=dtype), weight.t(), None)
    assert kernels.linear(random(0, 96, dtype=dtype), weight).shape == (0, 64)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """What makes bfloat16 decoding repeatable whatever else is in the batch; as far as the library's product goes."""
    if shutil.which("g++") is None:
        pytest.skip("the native kernels need g++")
    from pdserve.kernels import native

    kernels = native.load()
    if kernels.most_rows < 32:
        pytest.skip("no bfloat16 instructions: torch's product is used")
    x, weight = random(32, 1536, dtype=torch.bfloat16), random(64, 1536, dtype=torch.bfloat16)
    together = kernels.linear(x, weight)
    for rows in (1, 5, 16, 20):
        assert torch.equal(kernels.linear(x[:rows], weight), together[:rows])
