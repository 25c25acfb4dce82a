"""Models by shape: what their config.json says, for weights that are random, and a tokeniser of as many tokens."""

from __future__ import annotations

import json
from pathlib import Path

SHAPES: dict[str, dict[str, object]] = {
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
    },
    "llama-3-70b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
}


def write_shape(name: str, folder: Path) -> Path:
    """A model folder without weights, for `--load-format dummy`."""
    shape = SHAPES[name]
    assert isinstance(shape["vocab_size"], int)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(shape["vocab_size"])))
    return folder


def _tokenizer(vocab_size: int) -> dict[str, object]:
    """Every id is a word of its own, so that each token of an answer is text."""
    vocab = {f"Ġt{number}": number for number in range(vocab_size)}  # Ġ: a space, in byte-level vocabularies
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "Ġt0"}
    rest = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor")
    return {"version": "1.0", **dict.fromkeys(rest), "added_tokens": [], "decoder": decoder, "model": model}
