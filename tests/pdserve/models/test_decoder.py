"""The decoder gives transformers' logits, however a prompt is cut into chunks, batched and paged."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pdserve.kernels.base import Batch, Kernels
from pdserve.kernels.reference import ReferenceKernels
from pdserve.models.config import ModelConfig, load_config
from pdserve.models.decoder import Decoder
from pdserve.models.weights import open_weights, random_weights

THETA = {"rope_theta": 5000.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA}
FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)]}
POSITIONS = 160  # that our decoder allows, and longer than any prompt below

# Each is a family of transformers and what differs from its defaults; prompts are longer than the windows.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("Llama", {}),
    "mha": ("Llama", {"num_key_value_heads": 4}),
    "mqa_wide_heads": ("Llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **THETA}}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", **LLAMA3, **THETA}}),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **THETA}}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "yarn_tuned": (
        "Qwen3",
        {"rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.2}},
    ),
    "yarn_mscale": ("Llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "smollm3_windows": (
        "SmolLM3",
        {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 20, "tie_word_embeddings": False},
    ),
    "mistral": ("Mistral", {"sliding_window": 20}),
    "mistral_wide": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {}),
    "qwen2_windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_windows": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0, "attention_bias": True},
    ),
    "phi3": ("Phi3", {"sliding_window": 64}),
    "phi3_partial": (
        "Phi3",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 5000.0}},
    ),
    "phi3_longrope": (
        "Phi3",
        {
            "max_position_embeddings": 2 * POSITIONS,
            "original_max_position_embeddings": POSITIONS,
            "rope_parameters": {"rope_type": "longrope", **FACTORS, **THETA},
        },
    ),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 20, "query_pre_attn_scalar": 24}),
    "gemma2_caps": (
        "Gemma2",
        {"head_dim": 32, "sliding_window": 70, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 20, "num_hidden_layers": 7, "query_pre_attn_scalar": 24}),
    "gemma3_linear": (
        "Gemma3",
        {
            "head_dim": 16,
            "sliding_window": 20,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
    ),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            "mlp_bias": True,
        },
    ),
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


@pytest.fixture(params=["reference", "native"], scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "reference":
        return ReferenceKernels()
    if shutil.which("g++") is None:
        pytest.skip("the native kernels need g++")
    from pdserve.kernels import native

    return native.load()


@pytest.fixture(params=SHAPES, scope="module")
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> Path:
    family, changes = SHAPES[request.param]
    return make_checkpoint(family, **changes)


@pytest.fixture(scope="module")
def models(
    checkpoint: Path, kernels: Kernels, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Decoder, PreTrainedModel]:
    config = load_config(checkpoint)
    weights = open_weights(checkpoint, config, "float32", tmp_path_factory.mktemp("cache"))
    return Decoder(config, weights, kernels, POSITIONS), open_truth(checkpoint)


def open_truth(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def truth_logits(truth: PreTrainedModel, prompt: list[int]) -> Tensor:
    with torch.inference_mode():
        return truth(torch.tensor([prompt])).logits[0]


def test_whole_prefill_equals_transformers(models: tuple[Decoder, PreTrainedModel]) -> None:
    decoder, truth = models
    prompts = prompts_of(decoder.config, (1, 150, 16, 33))
    logits = Paged(decoder, prompts, 16, torch.float32).run({s: len(p) for s, p in enumerate(prompts)})
    for s, prompt in enumerate(prompts):
        torch.testing.assert_close(logits[s], truth_logits(truth, prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_mixed_chunks_and_decodes_equal_transformers(models: tuple[Decoder, PreTrainedModel], block_size: int) -> None:
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


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, **THETA}}),
        (
            "Phi3",
            {
                "original_max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "longrope", **FACTORS, "rope_theta": 5000.0},
            },
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_length_beyond_training_stretches_the_rotation(
    family: str, changes: dict[str, Any], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Of all positions, by the longest that is served, so that keys stay valid: transformers for a prompt that long."""
    folder = make_checkpoint(family, **changes)
    config = load_config(folder)
    weights = open_weights(folder, config, "float32", tmp_path)
    near, far, farther = (Decoder(config, weights, ReferenceKernels(), length) for length in (64, 150, 151))
    (prompt,) = prompts_of(config, (150,))
    logits = Paged(far, [prompt], 16, torch.float32).run({0: 150})[0]
    torch.testing.assert_close(logits, truth_logits(open_truth(folder), prompt), atol=1e-4, rtol=0)
    assert near.kv_identity == weights.identity != far.kv_identity
    assert (far.kv_identity == farther.kv_identity) == (family == "Phi3")


def test_default_model_greedy_text_equals_transformers(default_model: Path, model_cache: Path) -> None:
    from tokenizers import Tokenizer

    config = load_config(default_model)
    decoder = Decoder(config, open_weights(default_model, config, "float32", model_cache), ReferenceKernels(), 256)
    tokenizer = Tokenizer.from_file(str(default_model / "tokenizer.json"))
    prompt = tokenizer.encode("<|im_start|>user\nCount from 1 to 9.<|im_end|>\n<|im_start|>assistant\n").ids
    truth = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)
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
