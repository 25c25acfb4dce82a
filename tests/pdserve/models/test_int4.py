"""4-bit weights are near what they were made from, and one model with the dense ones that stand beside them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pdserve.errors import ConfigError
from pdserve.kernels.base import INT4_GROUP, Batch, Int4Weight
from pdserve.kernels.reference import ReferenceKernels
from pdserve.models.config import load_config
from pdserve.models.decoder import Decoder
from pdserve.models.int4 import fits, quantise, shapes
from pdserve.models.weights import open_weights

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the native kernels need g++")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_a_weight_is_rounded_to_the_nearest_of_its_levels() -> None:
    weight = random(48, 96)
    made = quantise(weight)
    assert (made.packed.shape, made.scales.shape) == shapes((48, 96))
    groups = weight.float().view(48, -1, INT4_GROUP)
    step = (groups.amax(-1) - groups.amin(-1)) / 10  # the coarsest grid that is tried
    error = (made.dense.float().view_as(groups) - groups).abs().amax(-1)
    assert (error < 0.6 * step).all()
    assert ((made.dense - weight).float().norm() / weight.float().norm()) < 0.085


def test_weights_that_lie_on_a_grid_stay_there() -> None:
    """As those of a 4-bit GGUF file do, whether or not they use all of its levels."""
    levels = torch.randint(2, 13, (16, 2, INT4_GROUP), generator=torch.Generator().manual_seed(0)).float()
    levels[:, 0, :2], levels[:, 1, :2] = torch.tensor([2.0, 12.0]), torch.tensor([2.0, 12.0])
    weight = (levels * 0.25 - 1.5).view(16, -1).bfloat16()
    assert torch.equal(quantise(weight).dense, weight)


def test_a_constant_weight_survives() -> None:
    for value in (0.0, 0.375, -3.0):
        weight = torch.full((16, 64), value).bfloat16()
        assert torch.equal(quantise(weight).dense, weight)


def test_which_shapes_fit() -> None:
    assert fits((16, 32))
    assert not any(map(fits, [(15, 32), (16, 48), (16,), (16, 32, 2)]))


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_few_rows_and_many_multiply_by_the_same_weight(rows: int, biased: bool) -> None:
    from pdserve.kernels import native

    made, x = quantise(random(64, 96)), random(rows, 96, seed=1)
    weight = Int4Weight(made.dense, made.packed, made.scales)
    bias = random(64, seed=2) if biased else None
    got = native.load().linear(x, weight, bias)
    expected = ReferenceKernels().linear(x.float(), made.dense.float(), None if bias is None else bias.float())
    assert (got.shape, got.dtype) == ((rows, 64), torch.bfloat16)
    assert (got.float() - expected).norm() < 6e-3 * expected.norm()


@needs_compiler
def test_a_row_does_not_depend_on_the_rest_of_the_batch() -> None:
    from pdserve.kernels import native

    made, x, kernels = quantise(random(64, 96)), random(8, 96, seed=1), native.load()
    weight = Int4Weight(made.dense, made.packed, made.scales)
    whole = kernels.linear(x, weight)
    for rows in (1, 2, 5):
        assert torch.equal(kernels.linear(x[:rows], weight), whole[:rows])


def decode(decoder: Decoder, tokens: list[int], chunk: int) -> Tensor:
    """Logits of all tokens, [tokens, vocab], computed `chunk` at a time."""
    config = decoder.config
    pool = torch.zeros(4, config.num_kv_heads, config.num_layers, 2, 16, config.head_dim, dtype=torch.bfloat16)
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


@needs_compiler
@pytest.mark.parametrize("tied", [True, False])
def test_prefill_and_decode_are_one_model(tied: bool, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A token at a time reads the 4 bits, a whole prompt what they stand for; a vocabulary of 131 stays dense."""
    from pdserve.kernels import native

    for vocab_size in (131, 144):
        folder = make_checkpoint(tie_word_embeddings=tied, vocab_size=vocab_size)
        config = load_config(folder)
        weights = open_weights(folder, config, "bfloat16", tmp_path, "int4")
        assert isinstance(weights.layers[1].down, Int4Weight)
        assert isinstance(weights.head, Int4Weight) == (vocab_size == 144)
        assert not isinstance(weights.layers[1].mlp_norm, Int4Weight)
        decoder = Decoder(config, weights, native.load(), 64)
        tokens = [(7 * i) % 131 for i in range(40)]
        whole, single = decode(decoder, tokens, 40), decode(decoder, tokens, 1)
        assert (whole - single).norm() < 0.03 * whole.norm()
        dense = Decoder(config, open_weights(folder, config, "bfloat16", tmp_path), native.load(), 64)
        assert (decode(dense, tokens, 40) - whole).norm() > 0.03 * whole.norm()


def test_4_bits_are_kept_apart_from_the_dense_weights(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint()
    config = load_config(folder)
    dense = open_weights(folder, config, "bfloat16", tmp_path)
    packed = open_weights(folder, config, "bfloat16", tmp_path, "int4")
    assert packed.identity != dense.identity
    assert open_weights(folder, config, "bfloat16", tmp_path, "int4").identity == packed.identity
    assert isinstance(open_weights(folder, config, "bfloat16", tmp_path).layers[0].qkv, Tensor)
    assert len(list((tmp_path / "weights").glob("*.safetensors"))) == 2
    with pytest.raises(ConfigError, match="int4 go with the dtype bfloat16, not float32"):
        open_weights(folder, config, "float32", tmp_path, "int4")
