"""The numbers that shape a model, read from the config.json of a Hugging Face style folder.

A family is described by differences in these numbers, not by a class of its own: another family is one more name in
`SUPPORTED_ARCHITECTURES` and, where it differs, one more field here that the decoder reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pdserve.errors import ConfigError
from pdserve.models.folder import CONFIG, GENERATION_CONFIG, read_json_object

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")
# Far above any real model: what lies beyond is a corrupt file.
_MAX_INT = 2**31 - 1
_MAX_NUMBER = 1e12


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched; see `pdserve.models.rope`. The last three are llama3's alone."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool  # of q, k, v and o
    mlp_bias: bool  # of gate, up and down
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def load_config(folder: Path) -> ModelConfig:
    """Read config.json, and the end-of-sequence tokens of generation_config.json where there is one.

    Raises:
        ConfigError: a missing or invalid file, an unsupported architecture or feature, impossible numbers.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(f"The model folder {folder} has no {CONFIG}; a Hugging Face style folder is needed.")
    values = read_json_object(path)
    generation_path = folder / GENERATION_CONFIG
    generation = read_json_object(generation_path) if generation_path.is_file() else {}
    config = _parse(_Fields(path, values), _Fields(generation_path, generation))
    _check_heads(path, config)
    return config


def _parse(fields: _Fields, generation: _Fields) -> ModelConfig:
    architecture = _architecture(fields)
    _refuse_unsupported(fields)
    num_heads = fields.count("num_attention_heads")
    hidden_size = fields.count("hidden_size")
    vocab_size = fields.count("vocab_size")
    rope_theta, rope_scaling = _rope(fields)
    eos = dict.fromkeys(
        (*fields.token_ids("eos_token_id", vocab_size), *generation.token_ids("eos_token_id", vocab_size))
    )
    bos = fields.token_ids("bos_token_id", vocab_size)
    # Defaults are those of transformers' LlamaConfig, which leaves them out of older files.
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=fields.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.count("num_key_value_heads", num_heads),
        head_dim=fields.count("head_dim", max(hidden_size // num_heads, 1)),
        vocab_size=vocab_size,
        rms_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=fields.count("max_position_embeddings", 2048),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        attention_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(eos),
    )


def _architecture(fields: _Fields) -> str:
    names = fields.values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in SUPPORTED_ARCHITECTURES:
        raise ConfigError(
            f"{fields.path} asks for the architecture {name!r}; supported: {', '.join(SUPPORTED_ARCHITECTURES)}."
        )
    return str(name)


def _refuse_unsupported(fields: _Fields) -> None:
    activation = fields.values.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"{fields.path} asks for hidden_act {activation!r}; supported: silu.")
    if fields.values.get("quantization_config"):
        raise ConfigError(
            f"{fields.path} has a quantization_config; supported: weights in bfloat16, float16 or float32."
        )


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    rope = fields.section("rope_parameters") or fields.section("rope_scaling")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in SUPPORTED_ROPE_TYPES:
        raise ConfigError(f"{fields.path} asks for rope type {kind!r}; supported: {', '.join(SUPPORTED_ROPE_TYPES)}.")
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"{fields.path} asks for a partial_rotary_factor; supported: 1.0.")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", rope.number("factor"))
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise ConfigError(f"{fields.path}: high_freq_factor ({high}) must be greater than low_freq_factor ({low}).")
    return theta, RopeScaling(
        "llama3", rope.number("factor"), low, high, rope.count("original_max_position_embeddings")
    )


def _check_heads(path: Path, config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{path}: num_attention_heads ({config.num_heads}) must be a multiple of"
            f" num_key_value_heads ({config.num_kv_heads})."
        )
    if config.head_dim % 2:
        raise ConfigError(f"{path}: head_dim ({config.head_dim}) must be even.")


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to a JSON object of `path`; every error names the file and the field."""

    path: Path
    values: dict[str, Any]

    def __bool__(self) -> bool:
        return bool(self.values)

    def section(self, name: str) -> _Fields:
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{self.path}: {name} must be an object, got {value!r}.")
        return _Fields(self.path, value or {})

    def count(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if type(value) is not int or not 0 < value <= _MAX_INT:
            raise ConfigError(f"{self.path}: {name} must be a positive integer, got {value!r}.")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0 < value <= _MAX_NUMBER:
            raise ConfigError(f"{self.path}: {name} must be a positive number, got {value!r}.")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._get(name, False)
        if type(value) is not bool:
            raise ConfigError(f"{self.path}: {name} must be true or false, got {value!r}.")
        return value

    def token_ids(self, name: str, vocab_size: int) -> list[int]:
        """A token id or a list of them; none is an empty list."""
        value = self.values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise ConfigError(f"{self.path}: {name} must be token ids in [0, {vocab_size}), got {value!r}.")
        return ids

    def _get(self, name: str, default: object) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.path} lacks {name}.")
        return value
