"""The engine gives transformers' log probabilities, for each family and for rotations stretched beyond their training.

Prompts in chunks beside decodes, decodes over scattered blocks, and prompts whose beginning is cached.
"""

from __future__ import annotations

import random
import shutil
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore.keys import root_key
from kvstore.pool import BlockPool
from pdserve.engine.config import EngineConfig
from pdserve.engine.engine import Engine
from pdserve.engine.runner import Runner
from pdserve.engine.sequence import Sequence
from pdserve.engine.torch_sampler import TorchSampler
from pdserve.kernels.reference import ReferenceKernels
from pdserve.models.config import load_config
from pdserve.models.decoder import Decoder
from pdserve.models.weights import open_weights
from pdserve.request import SamplingParams, TokenLogprobs
from tests.pdserve.models.test_decoder import FACTORS, SHAPES, THETA, open_truth, prompts_of, truth_logits

# A log probability has the error of its logit, which is at most 1e-4, and as much again of all logits' sum.
TOLERANCE = 2e-4
BLOCK_SIZE = 4
LENGTH = 96  # tokens of the longest sequence, and what is served at most
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **SHAPES,
    # Trained on half of what is served.
    "dynamic_stretched": (
        "Llama",
        {"max_position_embeddings": LENGTH // 2, "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, **THETA}},
    ),
    "longrope_stretched": (
        "Phi3",
        {
            "original_max_position_embeddings": LENGTH // 2,
            "rope_parameters": {"rope_type": "longrope", **FACTORS, "rope_theta": 5000.0},
        },
    ),
}


@pytest.fixture(params=CASES)
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> Path:
    family, changes = CASES[request.param]
    return make_checkpoint(family, **changes)


def make_engine(decoder: Decoder) -> Engine:
    """Chunks of at most 21 tokens beside the decodes; blocks that were never written hold no numbers."""
    config, num_blocks = decoder.config, 160
    shape = (num_blocks, config.num_kv_heads, config.num_layers, 2, BLOCK_SIZE, config.head_dim)
    limits = EngineConfig(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_batched_tokens=21,
        max_sequences=8,
        max_model_len=LENGTH,
    )
    return Engine(
        limits, BlockPool(num_blocks, BLOCK_SIZE), Runner(decoder, torch.full(shape, float("nan")), TorchSampler())
    )


def sequence_of(name: str, prompt: list[int], num_output: int, *, told: int, of_prompt: bool) -> Sequence:
    """Draws its output; tells of the log probabilities of all `told` tokens of the vocabulary."""
    sampling = SamplingParams(
        max_tokens=num_output, seed=len(prompt), logprobs=told, prompt_logprobs=told if of_prompt else None
    )
    return Sequence(
        name=name,
        token_ids=array("I", prompt),
        num_prompt_tokens=len(prompt),
        sampling=sampling,
        root_key=root_key(b"test"),
        block_size=BLOCK_SIZE,
        arrived_s=0.0,
    )


def row(logprobs: TokenLogprobs) -> Tensor:
    """Of all tokens, in order of their ids."""
    values = torch.empty(len(logprobs.top_ids))
    values[list(logprobs.top_ids)] = torch.tensor(logprobs.top_logprobs)
    return values


def test_log_probabilities_equal_transformers(checkpoint: Path, tmp_path: Path) -> None:
    config = load_config(checkpoint)
    if shutil.which("g++") is None:
        kernels: Any = ReferenceKernels()
    else:
        from pdserve.kernels import native

        kernels = native.load()
    decoder = Decoder(config, open_weights(checkpoint, config, "float32", tmp_path), kernels, LENGTH)
    engine, vocab = make_engine(decoder), config.vocab_size
    # All become as long as may be: where a rotation hangs on the length, that of transformers is this one's.
    prompts = prompts_of(config, (70, 31, 5))
    sequences = [
        sequence_of(f"s{i}", prompt, LENGTH - len(prompt), told=vocab, of_prompt=i != 1)
        for i, prompt in enumerate(prompts)
    ]
    sequences.append(sequence_of("shares", [*prompts[1][:30], 3], LENGTH - 31, told=vocab, of_prompt=False))
    told: dict[str, list[TokenLogprobs]] = {sequence.name: [] for sequence in sequences}
    rng, late = random.Random(1), list(sequences)
    while late or not engine.idle:
        if late and (engine.idle or rng.random() < 0.2):  # so that chunks of some are beside decodes of others
            engine.scheduler.add(late.pop(0))
        for token in engine.execute(engine.schedule(0.0), 0.0):
            assert token.logprobs is not None
            told[token.sequence.name].append(token.logprobs)
    assert sequences[-1].cached_tokens >= 28, "nothing was shared"
    truth = open_truth(checkpoint)
    for sequence in sequences:
        tokens = sequence.token_ids.tolist()
        assert len(tokens) == LENGTH
        expected = truth_logits(truth, tokens).log_softmax(dim=-1)[:-1]
        mine = torch.stack([row(each) for each in told[sequence.name]])
        torch.testing.assert_close(mine, expected[sequence.num_prompt_tokens - 1 :], atol=TOLERANCE, rtol=0)
        if sequence.prompt_logprobs:
            of_prompt = torch.stack([row(each) for each in sequence.prompt_logprobs])
            torch.testing.assert_close(of_prompt, expected[: sequence.num_prompt_tokens - 1], atol=TOLERANCE, rtol=0)
