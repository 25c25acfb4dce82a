"""The config.json that the fields of a GGUF file stand for."""

from __future__ import annotations

from typing import Any

import numpy as np

from pdserve.errors import ConfigError
from pdserve.models.gguf_file import GgufFile

# Ours, and the file's below its architecture. An absent one has the default of its family.
_COUNTS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window",
}
_NUMBERS = {
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
# Gemma's largest models scale scores by hidden_size / num_heads, which their files do not say: by number of layers.
_LARGEST_GEMMAS = {"Gemma2ForCausalLM": 46, "Gemma3ForCausalLM": 62}


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """
    Raises:
        ConfigError: a field is of a form that a dense model of the supported families does not have.
    """
    values: dict[str, Any] = {name: file.shape_field(own) for name, own in _COUNTS.items()}
    values |= {name: _shortest(file.shape_field(own)) for name, own in _NUMBERS.items()}
    values = {name: value for name, value in values.items() if value is not None}
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if name not in values:
            raise ConfigError(f"{file.path} lacks the field {_COUNTS[name]} of its architecture.")
    for name, value in values.items():
        if isinstance(value, list):
            raise ConfigError(f"{file.path}: {name} differs from layer to layer; supported: one for all.")
    if file.architecture in _LARGEST_GEMMAS:
        largest = values["num_hidden_layers"] == _LARGEST_GEMMAS[file.architecture]
        per_head = values["hidden_size"] // values["num_attention_heads"]
        values["query_pre_attn_scalar"] = per_head if largest else values.get("head_dim", 256)
    name = file.field("general.architecture")
    embedding = file.own.get("token_embd.weight")
    if embedding is None:
        raise ConfigError(f"{file.path} lacks the tensor token_embd.weight.")
    return {
        "architectures": [file.architecture],
        "model_type": "gemma3_text" if name == "gemma3" else name,  # transformers asks for it
        "vocab_size": int(embedding.shape[1]),
        "tie_word_embeddings": "output.weight" not in file.own,
        "attention_bias": "blk.0.attn_output.bias" in file.own,
        "mlp_bias": "blk.0.ffn_down.bias" in file.own,
        **values,
        **_rope(file, values),
        **token_ids(file),
    }


def token_ids(file: GgufFile) -> dict[str, Any]:
    """The special tokens of config.json and generation_config.json."""
    keys = {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}
    ids = {name: file.field(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    # Of instruction-tuned models the end of a turn may be another token than the end of a text.
    ends = [file.field(f"tokenizer.ggml.{key}") for key in ("eos_token_id", "eot_token_id")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return {name: value for name, value in ids.items() if value is not None}


def _rope(file: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    rope: dict[str, Any] = {}
    dimensions = file.shape_field("rope.dimension_count")
    if dimensions is not None and dimensions != head_dim:
        rope["partial_rotary_factor"] = dimensions / head_dim
    scaling = _scaling(file, values)
    return {**rope, "rope_scaling": scaling} if scaling else rope


def _scaling(file: GgufFile, values: dict[str, Any]) -> dict[str, Any] | None:
    original = file.shape_field("rope.scaling.original_context_length")
    amplitude = _shortest(file.shape_field("rope.scaling.attn_factor"))
    kind = file.shape_field("rope.scaling.type")
    if "rope_factors_long.weight" in file.own or "rope_freqs.weight" in file.own:
        # Files of Llama 3 hold what its stretching comes to for each frequency: a longrope that never changes.
        frozen = "rope_factors_long.weight" not in file.own
        short, long = ("rope_freqs",) * 2 if frozen else ("rope_factors_short", "rope_factors_long")
        scaling = {
            "rope_type": "longrope",
            "short_factor": file.read(f"{short}.weight").tolist(),
            "long_factor": file.read(f"{long}.weight").tolist(),
            "original_max_position_embeddings": original or values.get("max_position_embeddings"),
        }
        return {**scaling, "attention_factor": 1.0 if frozen else amplitude}
    if kind in (None, "none"):
        return None
    return {
        "rope_type": kind,
        "factor": _shortest(file.shape_field("rope.scaling.factor")),
        "original_max_position_embeddings": original,
    }


def _shortest(value: Any) -> Any:
    """GGUF holds float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
