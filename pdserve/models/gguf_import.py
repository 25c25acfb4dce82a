"""Turning a GGUF file of the Llama family into a Hugging Face style folder.

Needs `gguf`, `tokenizers` and torch, so it is imported where a conversion really happens, not at every start. Only what
the default model uses is covered: a byte-level BPE tokeniser with single digits (`smollm`), tied embeddings, no biases.

Llama GGUF files store the rows of q and k with the two elements of a rotated pair next to each other; the Hugging Face
convention wants the first elements of all pairs, then the second ones: `_unpermute` undoes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pdserve.errors import ConfigError
from pdserve.models.folder import CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS

Progress = Callable[[float], None]  # the finished fraction, 0 to 1

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, folder: Path, progress: Progress) -> None:
    """Write config, tokeniser and bfloat16 weights of the GGUF file `source` into the existing `folder`.

    Raises:
        ConfigError: the file is not a Llama GGUF with the tokeniser described above.
    """
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = (fields.get("general.architecture"), fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise ConfigError(f"{source} holds {kind}; supported for conversion: llama with a gpt2/smollm tokeniser.")
    _write_json(folder / CONFIG, _config(fields))
    _write_json(folder / GENERATION_CONFIG, _generation_config(fields))
    _write_json(folder / TOKENIZER_CONFIG, _tokenizer_config(fields))
    _tokenizer(fields).save(str(folder / TOKENIZER))
    tensors = _tensors(reader, fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"], progress)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _tensors(reader: GGUFReader, num_heads: int, num_kv_heads: int, progress: Progress) -> dict[str, torch.Tensor]:
    tensors = {}
    for count, tensor in enumerate(reader.tensors, start=1):
        values = dequantize(tensor.data, tensor.tensor_type)  # float32, rows first
        if ".attn_q." in tensor.name:
            values = _unpermute(values, num_heads)
        elif ".attn_k." in tensor.name:
            values = _unpermute(values, num_kv_heads)
        tensors[_name(tensor.name)] = torch.tensor(values, dtype=torch.bfloat16)
        progress(count / len(reader.tensors))
    return tensors


def _unpermute(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """[heads * D/2 pairs * 2, H] -> [heads * 2 * D/2, H]."""
    rows, columns = values.shape
    return values.reshape(num_heads, -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, layer, kind, suffix = name.split(".")  # blk.7.attn_q.weight
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **_generation_config(fields),
    }


def _shortest(value: float) -> float:
    """GGUF holds float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    ids = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {name: fields[f"tokenizer.ggml.{key}"] for name, key in ids.items()}


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **{name: tokens[fields[f"tokenizer.ggml.{key}"]] for name, key in keys.items()},
        "chat_template": fields["tokenizer.chat_template"],
    }


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE that splits each digit off first; the control tokens match before any of that."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    control = [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens(control)
    return tokenizer


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
