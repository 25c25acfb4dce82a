"""Every form of a config.json is read alike, a file that leaves out defaults means them, and what cannot be served is
refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdserve.errors import ConfigError
from pdserve.models.config import ModelConfig, load_config
from pdserve.models.families import FAMILIES
from pdserve.models.folder import check_folder, weight_files
from pdserve.models.rope_config import Rope

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
    assert config.ropes == (Rope(10_000.0, 16),)
    assert {(layer.rope, layer.window) for layer in config.layers} == {(0, None)}
    assert (config.tie_word_embeddings, config.qkv_bias, config.output_bias, config.mlp_bias) == (False,) * 4
    assert (config.embedding_scale, config.residual_scale, config.logit_scale) == (1.0, 1.0, 1.0)
    assert (config.attention_scale, config.attention_softcap, config.logit_softcap) == (0.25, None, None)
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


LLAMA3 = Rope(5e5, 16, "llama3", 8.0, 1.0, 8192, 1.0, 4.0)
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 5e5}, Rope(5e5, 16)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5, 16)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(5e5, 16)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, Rope(5e5, 16, "linear", 2.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, Rope(1e4, 16, "linear", 2.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}, LLAMA3),
        ({"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}}, LLAMA3),
        ({"partial_rotary_factor": 0.25}, Rope(1e4, 4)),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}, "max_position_embeddings": 64},
            Rope(1e4, 16, "dynamic", 2.0, 1.0, 64),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64}},
            Rope(1e4, 16, "yarn", 1.0, 1.0, 64),
        ),
        (
            {"rope_scaling": {"type": "su", **LONG}, "max_position_embeddings": 64},
            Rope(1e4, 16, "longrope", 1.0, 1.0, 64, short_factors=(1.0,) * 8, long_factors=(2.0,) * 8),
        ),
    ],
)
def test_rope_is_read_in_its_old_and_new_form(tmp_path: Path, rope: dict[str, Any], expected: Rope) -> None:
    assert load(tmp_path, **rope).ropes == (expected,)


def test_two_ropes_are_read_in_their_old_and_new_form(tmp_path: Path) -> None:
    gemma = {"architectures": ["Gemma3ForCausalLM"], "head_dim": 16}
    linear = {"rope_type": "linear", "factor": 8.0}
    expected = (Rope(1e6, 16, "linear", 8.0), Rope(1e4, 16))
    assert load(tmp_path, **gemma, rope_scaling=linear).ropes == expected
    assert load(tmp_path, **gemma, rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=linear).ropes == expected
    named = {"full_attention": {**linear, "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert load(tmp_path, **gemma, rope_parameters=named).ropes == expected


@pytest.mark.parametrize(
    ("changes", "windows", "ropes"),
    [
        ({}, [None] * 4, [0] * 4),
        ({"sliding_window": 8}, [None] * 4, [0] * 4),  # Llama has none
        ({"architectures": ["MistralForCausalLM"]}, [4096] * 4, [0] * 4),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, [None] * 4, [0] * 4),
        ({"architectures": ["Phi3ForCausalLM"], "sliding_window": 8}, [8] * 4, [0] * 4),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8}, [None] * 4, [0] * 4),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 8,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            [None, None, None, 8],
            [0] * 4,
        ),
        ({"architectures": ["Gemma2ForCausalLM"], "sliding_window": 8}, [8, None, 8, None], [0] * 4),
        (
            {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 8, "sliding_window_pattern": 3},
            [8, 8, None, 8],
            [1, 1, 0, 1],
        ),
        ({"architectures": ["SmolLM3ForCausalLM"]}, [None] * 4, [0, 0, 0, None]),
        (
            {
                "architectures": ["SmolLM3ForCausalLM"],
                "sliding_window": 8,
                "use_sliding_window": True,
                "no_rope_layers": [1, 0, 1, 1],
            },
            [None, 8, None, None],
            [0, None, 0, 0],
        ),
    ],
)
def test_layers_differ_as_the_family_says(
    tmp_path: Path, changes: dict[str, Any], windows: list[int | None], ropes: list[int | None]
) -> None:
    config = load(tmp_path, num_hidden_layers=4, **changes)
    assert [layer.window for layer in config.layers] == windows
    assert [layer.rope for layer in config.layers] == ropes


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_family_means_the_defaults_of_transformers(tmp_path: Path, architecture: str) -> None:
    """A file that says nothing but the sizes is read as transformers reads it."""
    import transformers

    config = load(tmp_path, architectures=[architecture], num_key_value_heads=2, num_hidden_layers=12)
    prefix = architecture.removesuffix("ForCausalLM")
    truth_class = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    sizes = {name: value for name, value in LLAMA.items() if name != "architectures"}
    truth = truth_class(**{**sizes, **tokens, "num_key_value_heads": 2, "num_hidden_layers": 12})
    assert config.head_dim == (getattr(truth, "head_dim", None) or 16)
    assert config.tie_word_embeddings == truth.tie_word_embeddings
    assert config.rms_eps == truth.rms_norm_eps
    assert config.activation == ("gelu_tanh" if "Gemma" in architecture else "silu")
    kinds = getattr(truth, "layer_types", None)
    window = getattr(truth, "sliding_window", None)
    windows = [window] * 12 if kinds is None else [window if kind[0] == "s" else None for kind in kinds]
    assert [layer.window for layer in config.layers] == windows
    parameters = truth.rope_parameters
    thetas = [parameters[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention") if kind in parameters]
    assert [rope.theta for rope in config.ropes] == (thetas or [parameters["rope_theta"]])


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
        (
            {"architectures": ["DeepseekV3ForCausalLM"]},
            "'DeepseekV3ForCausalLM'; supported: LlamaForCausalLM, .*Granite",
        ),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "'Gemma3ForConditionalGeneration'; supported: Llama"),
        (
            {"rope_scaling": {"rope_type": "mrope"}},
            "rope type 'mrope'; supported: default, linear, dynamic",
        ),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "supported: default, linear"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
            "short_factor must be a list of 8",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 7 + [-1]}},
            "short_factor must be a positive number",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "layer_types": ["x"]},
            "layer_types must list",
        ),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]}, "no_rope_layers must list one of 0, 1"),
        ({"use_bidirectional_attention": True}, "supported: causal attention"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "must be greater than low_freq_factor"),
        ({"partial_rotary_factor": 0.2}, "partial_rotary_factor .0.2. must leave an even part"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor .2.0. must leave an even part"),
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
