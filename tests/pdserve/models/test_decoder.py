"""The decoder gives transformers' logits, however a prompt is cut into chunks, batched and paged."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from pdserve.kernels.base import Batch
from pdserve.kernels.reference import ReferenceKernels
from pdserve.models.config import ModelConfig, load_config
from pdserve.models.decoder import Decoder
from pdserve.models.weights import open_weights, random_weights

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa_wide_heads": {"num_key_value_heads": 1, "head_dim": 32},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


class Paged:
    """Sequences in a pool of scattered blocks; `run` computes the next tokens of some of them as one batch."""

    def __init__(self, decoder: Decoder, prompts: list[list[int]], block_size: int, dtype: torch.dtype) -> None:
        config = decoder.config
        self.decoder, self.prompts, self.computed = decoder, prompts, [0] * len(prompts)
        blocks = -(-max(map(len, prompts)) // block_size)
        order = torch.randperm(blocks * len(prompts), generator=torch.Generator().manual_seed(0))
        self.tables = order.view(len(prompts), blocks).int()
        shape = (order.numel(), config.num_kv_heads, config.num_layers, 2, block_size, config.head_dim)
        self.pool = torch.full(shape, float("nan"), dtype=dtype)  # what was never written must not matter

    def run(self, chunks: dict[int, int]) -> dict[int, Tensor]:
        """Compute `tokens` more of each sequence of {sequence: tokens} -> their logits, [tokens, vocab] each."""
        spans = {s: range(self.computed[s], self.computed[s] + tokens) for s, tokens in chunks.items()}
        starts = torch.tensor([0, *chunks.values()]).cumsum(0).int()
        batch = Batch(
            positions=torch.tensor([p for span in spans.values() for p in span], dtype=torch.int32),
            query_start=starts,
            context_len=torch.tensor([span.stop for span in spans.values()], dtype=torch.int32),
            block_tables=self.tables[list(spans)].contiguous(),
            max_query_len=max(chunks.values()),
        )
        token_ids = torch.tensor([self.prompts[s][p] for s, span in spans.items() for p in span])
        logits = self.decoder.logits(self.decoder.forward(token_ids, batch, self.pool))
        for s, tokens in chunks.items():
            self.computed[s] += tokens
        return dict(zip(chunks, logits.split(list(chunks.values())), strict=True))


def prompts_of(config: ModelConfig, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(config.vocab_size) for _ in range(length)] for length in lengths]


@pytest.fixture(params=SHAPES, scope="module")
def models(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Decoder, LlamaForCausalLM]:
    folder = make_checkpoint(**SHAPES[request.param])
    config = load_config(folder)
    weights = open_weights(folder, config, "float32", tmp_path_factory.mktemp("cache"))
    truth = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return Decoder(config, weights, ReferenceKernels(), config.max_position_embeddings), truth


def truth_logits(truth: LlamaForCausalLM, prompt: list[int]) -> Tensor:
    with torch.inference_mode():
        return truth(torch.tensor([prompt])).logits[0]


def test_whole_prefill_equals_transformers(models: tuple[Decoder, LlamaForCausalLM]) -> None:
    decoder, truth = models
    prompts = prompts_of(decoder.config, (1, 150, 16, 33))
    logits = Paged(decoder, prompts, 16, torch.float32).run({s: len(p) for s, p in enumerate(prompts)})
    for s, prompt in enumerate(prompts):
        torch.testing.assert_close(logits[s], truth_logits(truth, prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_mixed_chunks_and_decodes_equal_transformers(models: tuple[Decoder, LlamaForCausalLM], block_size: int) -> None:
    decoder, truth = models
    prompts = prompts_of(decoder.config, (70, 5, 48, 31))
    paged = Paged(decoder, prompts, block_size, torch.float32)
    rng = random.Random(block_size)
    got: dict[int, list[Tensor]] = {s: [] for s in range(len(prompts))}
    while left := {s: len(p) - paged.computed[s] for s, p in enumerate(prompts) if paged.computed[s] < len(p)}:
        some = rng.sample(sorted(left), rng.randint(1, len(left)))
        for s, logits in paged.run({s: min(rng.choice((1, 1, 4, 16, 23)), left[s]) for s in some}).items():
            got[s].append(logits)
    for s, prompt in enumerate(prompts):
        torch.testing.assert_close(torch.cat(got[s]), truth_logits(truth, prompt), atol=1e-4, rtol=0)


def test_default_model_greedy_text_equals_transformers(default_model: Path, model_cache: Path) -> None:
    from tokenizers import Tokenizer

    config = load_config(default_model)
    decoder = Decoder(config, open_weights(default_model, config, "float32", model_cache), ReferenceKernels(), 256)
    tokenizer = Tokenizer.from_file(str(default_model / "tokenizer.json"))
    prompt = tokenizer.encode("<|im_start|>user\nCount from 1 to 9.<|im_end|>\n<|im_start|>assistant\n").ids
    truth = LlamaForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    expected = truth.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0].tolist()

    tokens = list(prompt)
    paged = Paged(decoder, [expected], 16, torch.float32)  # room for all; tokens come from our own logits
    paged.prompts = [tokens]
    while len(tokens) < len(expected):
        chunk = len(tokens) - paged.computed[0]
        tokens.append(int(paged.run({0: chunk})[0][-1].argmax()))
    assert tokens == expected


def test_bfloat16_stays_near_float32(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint()
    config = load_config(folder)
    prompts = prompts_of(config, (40,))
    logits = []
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        decoder = Decoder(config, open_weights(folder, config, name, tmp_path), ReferenceKernels(), 64)
        logits.append(Paged(decoder, prompts, 8, dtype).run({0: 40})[0])
    assert logits[1].dtype == torch.float32
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()


def test_random_weights_repeat_and_run(make_checkpoint: Callable[..., Path]) -> None:
    config = load_config(make_checkpoint())
    first, again, other = (random_weights(config, "float32", seed) for seed in (1, 1, 2))
    assert torch.equal(first.layers[1].qkv, again.layers[1].qkv)
    assert first.identity == again.identity != other.identity
    decoder = Decoder(config, first, ReferenceKernels(), 32)
    assert Paged(decoder, [[1, 2, 3]], 4, torch.float32).run({0: 3})[0].isfinite().all()
