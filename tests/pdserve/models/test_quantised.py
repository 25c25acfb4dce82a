"""Weights in 8 and 4 bits are near what they were made from, and one model for prefill and decode on any kernels."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pdserve.errors import ConfigError
from pdserve.kernels.base import Batch, Kernels
from pdserve.kernels.quantised import GROUP, Bits, QuantisedWeight, fits, packed_shapes, rounded
from pdserve.kernels.reference import ReferenceKernels
from pdserve.models.config import load_config
from pdserve.models.decoder import Decoder
from pdserve.models.quantise import quantise
from pdserve.models.weight_format import WeightFormat
from pdserve.models.weights import open_weights

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the native kernels need g++")
both = pytest.mark.parametrize("bits", [8, 4])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def native_kernels() -> Kernels:
    from pdserve.kernels import native

    return native.load()


@pytest.mark.parametrize(("bits", "levels", "off"), [(8, 127 * 2, 0.006), (4, 10, 0.085)])
def test_a_weight_is_rounded_to_the_nearest_of_its_levels(bits: Bits, levels: int, off: float) -> None:
    """4 bits: 10 steps are the coarsest grid that is tried."""
    weight = random(48, 96)
    made = quantise(weight, bits)
    groups = weight.view(48, -1, GROUP)
    span = groups.amax(-1) - groups.amin(-1) if bits == 4 else 2 * groups.abs().amax(-1)
    error = (made.values().view_as(groups) - groups).abs().amax(-1)
    assert (error < 0.6 * span / levels).all()
    assert (made.values() - weight).norm() / weight.norm() < off


@both
def test_the_layout_gives_back_what_went_in(bits: Bits) -> None:
    made = quantise(random(48, 96), bits)
    weight = made.pack()
    assert (weight.data.shape, weight.scales.shape) == packed_shapes((48, 96), bits)
    assert (weight.bits, weight.shape) == (bits, (48, 96))
    assert torch.equal(weight.values(), made.values())
    rows = torch.tensor([47, 3, 3, 16])
    assert torch.equal(weight.rows(rows), made.values()[rows])


def test_weights_that_lie_on_a_grid_stay_there() -> None:
    """As those of a 4-bit GGUF file do, whether or not they use all of its levels."""
    levels = torch.randint(2, 13, (16, 2, GROUP), generator=torch.Generator().manual_seed(0)).float()
    levels[:, 0, :2], levels[:, 1, :2] = torch.tensor([2.0, 12.0]), torch.tensor([2.0, 12.0])
    weight = (levels * 0.25 - 1.5).view(16, -1)
    assert torch.equal(quantise(weight, 4).values(), weight)


def test_a_constant_weight_survives() -> None:
    for value in (0.0, 0.375, -3.0):
        weight = torch.full((16, 64), value)
        assert torch.equal(quantise(weight, 4).values(), weight)
        assert torch.allclose(quantise(weight, 8).values(), weight, rtol=1e-3)


def test_which_shapes_fit() -> None:
    assert fits((16, 32))
    assert not any(map(fits, [(15, 32), (16, 48), (16,), (16, 32, 2)]))


@needs_compiler
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8, 15, 40])
def test_the_native_product_is_that_of_the_definition(
    rows: int, dtype: torch.dtype, bits: Bits, native_kernels: Kernels
) -> None:
    weight, x, bias = quantise(random(64, 96), bits).pack(), random(rows, 96, seed=1).to(dtype), random(64).to(dtype)
    x[0, :GROUP] = 0
    for add in (None, bias):
        got, expected = native_kernels.linear(x, weight, add), ReferenceKernels().linear(x, weight, add)
        assert (got.shape, got.dtype) == ((rows, 64), dtype)
        assert (got - expected).float().norm() < (1e-5 if dtype == torch.float32 else 3e-3) * expected.float().norm()


def test_what_is_multiplied_is_rounded_little() -> None:
    x = random(5, 96)
    assert 0 < (rounded(x) - x).norm() < 0.01 * x.norm()
    assert torch.equal(rounded(torch.zeros(2, 32)), torch.zeros(2, 32))


@needs_compiler
@both
def test_a_row_does_not_depend_on_the_rest_of_the_batch(bits: Bits, native_kernels: Kernels) -> None:
    weight, x = quantise(random(64, 96), bits).pack(), random(31, 96, seed=1).bfloat16()
    whole = native_kernels.linear(x, weight)
    for rows in (1, 2, 5, 16):
        assert torch.equal(native_kernels.linear(x[:rows], weight), whole[:rows])


@needs_compiler
def test_what_does_not_fit_is_refused(native_kernels: Kernels) -> None:
    weight = quantise(random(64, 96), 8).pack()
    for x, bias in ((random(1, 64), None), (random(1, 96), random(32)), (random(1, 96), random(64).bfloat16())):
        with pytest.raises(ValueError, match="does not fit a weight"):
            native_kernels.linear(x, weight, bias)


def decode(decoder: Decoder, tokens: list[int], chunk: int) -> Tensor:
    """Logits of all tokens, [tokens, vocab], computed `chunk` at a time."""
    config, dtype = decoder.config, decoder.weights.final_norm.dtype
    pool = torch.zeros(4, config.num_kv_heads, config.num_layers, 2, 16, config.head_dim, dtype=dtype)
    out = []
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        batch = Batch(
            positions=torch.arange(start, start + len(part), dtype=torch.int32),
            query_start=torch.tensor([0, len(part)], dtype=torch.int32),
            context_len=torch.tensor([start + len(part)], dtype=torch.int32),
            block_tables=torch.arange(4, dtype=torch.int32).unsqueeze(0),
            max_query_len=len(part),
        )
        out.append(decoder.logits(decoder.forward(torch.tensor(part), batch, pool)))
    return torch.cat(out)


def distance(one: Tensor, other: Tensor) -> float:
    """Relative to the first."""
    return float((one - other).norm() / one.norm())


@needs_compiler
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_prefill_and_decode_are_one_model(
    tied: bool,
    weight_format: WeightFormat,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    native_kernels: Kernels,
) -> None:
    """A vocabulary of 131 is no multiple of 16: its table stays dense.

    Not to the last bit: attention of a prompt and of a token sum in another order, and so do kernels. Where a value
    lies on the edge between two levels its rounding tips, and all that follows is off by up to 1 %. That is so for one
    checkpoint in ten: of several the nearest agrees, which no systematic difference would leave.
    """
    tokens = [(7 * i) % 131 for i in range(40)]
    for vocab_size in (131, 144):
        off: list[tuple[float, float]] = []
        for context in range(256, 261):
            folder = make_checkpoint(tie_word_embeddings=tied, vocab_size=vocab_size, max_position_embeddings=context)
            config = load_config(folder)
            weights = open_weights(folder, config, "float32", tmp_path, weight_format)
            assert isinstance(weights.layers[1].down, QuantisedWeight)
            assert isinstance(weights.head, QuantisedWeight) == (vocab_size == 144)
            assert (weights.head is weights.embedding) == tied
            decoder = Decoder(config, weights, native_kernels, 64)
            whole, single = decode(decoder, tokens, 40), decode(decoder, tokens, 1)
            reference = decode(Decoder(config, weights, ReferenceKernels(), 64), tokens, 40)
            off.append((distance(whole, single), distance(whole, reference)))
            dense = Decoder(config, open_weights(folder, config, "float32", tmp_path), native_kernels, 64)
            assert distance(whole, decode(dense, tokens, 40)) > 3e-3
        for each in zip(*off, strict=True):
            assert min(each) < 1e-5
            assert max(each) < 1e-2


def test_packed_weights_are_kept_apart_from_the_dense_ones(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint()
    config = load_config(folder)
    formats: tuple[WeightFormat, ...] = ("dense", "int8", "int4")
    opened = [open_weights(folder, config, "bfloat16", tmp_path, name) for name in formats]
    assert len({weights.identity for weights in opened}) == 3
    assert open_weights(folder, config, "bfloat16", tmp_path, "int4").identity == opened[2].identity
    assert isinstance(opened[0].layers[0].qkv, Tensor)
    sizes = [sum(x.stat().st_size for x in (tmp_path / "weights").glob(f"*{end}.safetensors")) for end in formats[1:]]
    assert sizes[1] < sizes[0]
    with pytest.raises(ConfigError, match=r"As the GGUF file has them|has safetensors"):
        open_weights(folder, config, "bfloat16", tmp_path, "gguf")
