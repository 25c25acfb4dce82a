"""Every form of a Llama config.json is read alike, and what cannot be served is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdserve.errors import ConfigError
from pdserve.models.config import ModelConfig, RopeScaling, load_config
from pdserve.models.folder import check_folder, weight_files

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def load(folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    values = {name: value for name, value in {**LLAMA, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_config(folder)


def test_absent_fields_have_the_defaults_of_llama(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.rms_eps) == (4, 16, 1e-6)
    assert (config.rope_theta, config.rope_scaling) == (10_000.0, None)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, 5e5, RopeScaling("linear", 2.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 1e4, RopeScaling("linear", 2.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}, 5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
        ({"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}}, 5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
    ],
)
def test_rope_is_read_in_its_old_and_new_form(
    tmp_path: Path, rope: dict[str, Any], theta: float, scaling: RopeScaling | None
) -> None:
    config = load(tmp_path, **rope)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_eos_tokens_of_both_files_are_joined(tmp_path: Path) -> None:
    assert load(tmp_path, {"eos_token_id": [3, 2]}, eos_token_id=2, bos_token_id=1).eos_token_ids == (2, 3)
    assert load(tmp_path, {"eos_token_id": 7}, eos_token_id=None).eos_token_ids == (7,)
    assert load(tmp_path, {}, eos_token_id=[4, 5]).eos_token_ids == (4, 5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'; supported: LlamaForCausalLM"),
        ({"architectures": ...}, "supported: LlamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, "supported: LlamaForCausalLM"),
        ({"architectures": [["LlamaForCausalLM"]]}, "supported: LlamaForCausalLM"),
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        ({"hidden_size": True}, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer"),
        ({"vocab_size": 10**30}, "vocab_size must be a positive integer"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"head_dim": 15}, "head_dim .15. must be even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta must be a positive number"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; supported: silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config; supported: weights in bfloat16"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn'; supported: default, linear, llama3"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "supported: default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "must be greater than low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor; supported: 1.0"),
        ({"eos_token_id": 100}, r"eos_token_id must be token ids in \[0, 100\)"),
        ({"bos_token_id": "<s>"}, "bos_token_id must be token ids"),
    ],
)
def test_unusable_config_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load(tmp_path, **changes)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "not valid JSON"), ("[]", "must hold a JSON object, not a list"), ("[" * 100_000, "not valid JSON")],
)
def test_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_config(tmp_path)


def test_config_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_config(tmp_path)


def test_each_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist or is not a folder"):
        check_folder(tmp_path / "absent")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        with pytest.raises(ConfigError, match=name):
            check_folder(tmp_path)
        (tmp_path / name).write_text("{}")
    check_folder(tmp_path)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": {"a": "missing.safetensors"}}, "missing.safetensors, which is missing"),
        ({"weight_map": {"a": "../model.safetensors"}}, "not a file name"),
        ({"weight_map": {"a": 3}}, "not a file name"),
    ],
)
def test_invalid_weight_index_is_refused(tmp_path: Path, index: dict[str, Any], sentence: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=sentence):
        weight_files(tmp_path)
