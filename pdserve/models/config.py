"""The numbers that shape a model, read from the config.json of a Hugging Face style folder.

The decoder and the weights read all differences between families from here; where they come from is a row of
`pdserve.models.families` and the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pdserve.errors import ConfigError
from pdserve.models.families import FAMILIES, Family, QkNorm
from pdserve.models.fields import Fields
from pdserve.models.folder import CONFIG, GENERATION_CONFIG, read_json_object
from pdserve.models.rope_config import Rope, read_ropes

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may change from layer to layer."""

    window: int | None  # a token attends to so many, itself included; None: to all before it
    rope: int | None  # which of the model's rotations; None: it is not rotated


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    count: int
    per_token: int
    size: int  # intermediate, of one
    shared_size: int  # of the expert that all tokens have; 0: there is none
    normalised: bool  # the shares of a token's experts sum to 1
    layers: tuple[bool, ...]  # which layers have experts; the others have an MLP


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str  # a key of FAMILIES
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    layers: tuple[LayerConfig, ...]
    ropes: tuple[Rope, ...]
    max_position_embeddings: int
    rms_eps: float
    norm_offset: float  # added to the weights of every norm
    activation: Activation  # of gate
    qk_norm: QkNorm | None
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    embedding_scale: float
    residual_scale: float  # of what attention and MLP add to the residual
    attention_scale: float
    attention_softcap: float | None  # scores pass through softcap * tanh(score / softcap)
    logit_scale: float
    logit_softcap: float | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    experts: ExpertsConfig | None = None

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

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
    architecture = _architecture(path, values.get("architectures"))
    options = FAMILIES[architecture].options
    return _parse(Fields(path, {**options, **values}), architecture, Fields(generation_path, generation))


def _architecture(path: Path, names: object) -> str:
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(f"{path} asks for the architecture {name!r}; supported: {', '.join(FAMILIES)}.")
    return name


def _parse(fields: Fields, architecture: str, generation: Fields) -> ModelConfig:
    family = FAMILIES[architecture]
    _refuse_unsupported(fields)
    num_heads = fields.count("num_attention_heads")
    hidden_size = fields.count("hidden_size")
    vocab_size = fields.count("vocab_size")
    head_dim = fields.count("head_dim", max(hidden_size // num_heads, 1))
    eos = dict.fromkeys(
        (*fields.token_ids("eos_token_id", vocab_size), *generation.token_ids("eos_token_id", vocab_size))
    )
    bos = fields.token_ids("bos_token_id", vocab_size)
    num_kv_heads = fields.count("num_key_value_heads", num_heads)
    _check_heads(fields.path, num_heads, num_kv_heads, head_dim)
    ropes = read_ropes(fields, family, head_dim)
    # Defaults are those of transformers' LlamaConfig, which leaves them out of older files.
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        layers=_layers(fields, family, two_ropes=len(ropes) == 2),
        ropes=ropes,
        max_position_embeddings=fields.count("max_position_embeddings", 2048),
        rms_eps=fields.number("rms_norm_eps", 1e-6),
        norm_offset=family.norm_offset,
        activation=_activation(fields),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias or fields.flag("attention_bias"),
        output_bias=not family.qkv_bias and fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        embedding_scale=_embedding_scale(fields, family, hidden_size),
        residual_scale=_option(fields, family, "residual_multiplier", 1.0),
        attention_scale=_attention_scale(fields, family, head_dim),
        attention_softcap=_cap(fields, family, "attn_logit_softcapping"),
        logit_scale=1.0 / _option(fields, family, "logits_scaling", 1.0),
        logit_softcap=_cap(fields, family, "final_logit_softcapping"),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(eos),
        experts=_experts(fields, family),
    )


def _experts(fields: Fields, family: Family) -> ExpertsConfig | None:
    if family.experts is None:
        return None
    # The name that transformers 5 writes for all of them comes first.
    local = "num_local_experts"
    count = fields.count(local if fields.values.get(local) is not None else family.experts.count)
    per_token = fields.count("num_experts_per_tok")
    if per_token > count:
        raise ConfigError(f"{fields.path}: num_experts_per_tok ({per_token}) must be at most {count}, of all experts.")
    num_layers, step = fields.count("num_hidden_layers"), 1
    dense: object = []
    if "mlp_only_layers" in family.options:
        step, dense = fields.count("decoder_sparse_step"), fields.values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ConfigError(f"{fields.path}: mlp_only_layers must be a list of layers, got {dense!r}.")
    shared = "shared_expert_intermediate_size"
    return ExpertsConfig(
        count=count,
        per_token=per_token,
        size=fields.count(family.experts.size),
        shared_size=fields.count(shared) if shared in family.options else 0,
        normalised=fields.flag("norm_topk_prob") if "norm_topk_prob" in family.options else True,
        layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)),
    )


def _refuse_unsupported(fields: Fields) -> None:
    if fields.values.get("quantization_config"):
        raise ConfigError(
            f"{fields.path} has a quantization_config; supported: weights in bfloat16, float16 or float32,"
            " and quantised ones in GGUF files."
        )
    if fields.flag("use_bidirectional_attention"):
        raise ConfigError(f"{fields.path} asks for use_bidirectional_attention; supported: causal attention.")


def _activation(fields: Fields) -> Activation:
    name = fields.values.get("hidden_activation") or fields.values.get("hidden_act") or "silu"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(f"{fields.path} asks for hidden_act {name!r}; supported: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def _option(fields: Fields, family: Family, name: str, default: float) -> float:
    return fields.number(name, default) if name in family.options else default


def _cap(fields: Fields, family: Family, name: str) -> float | None:
    return fields.number_or_none(name) if name in family.options else None


def _embedding_scale(fields: Fields, family: Family, hidden_size: int) -> float:
    return hidden_size**0.5 if family.embedding_scaled else _option(fields, family, "embedding_multiplier", 1.0)


def _attention_scale(fields: Fields, family: Family, head_dim: int) -> float:
    if "attention_multiplier" in family.options:
        return fields.number("attention_multiplier")
    return 1.0 / math.sqrt(_option(fields, family, "query_pre_attn_scalar", head_dim))


def _layers(fields: Fields, family: Family, two_ropes: bool) -> tuple[LayerConfig, ...]:
    num_layers = fields.count("num_hidden_layers")
    rotated = _rotated(fields, family, num_layers)
    windows = _windows(fields, family, rotated)

    def rope(layer: int) -> int | None:
        if not rotated[layer]:
            return None
        return 1 if two_ropes and windows[layer] is not None else 0

    return tuple(LayerConfig(windows[layer], rope(layer)) for layer in range(num_layers))


def _rotated(fields: Fields, family: Family, num_layers: int) -> list[bool]:
    if "no_rope_layers" not in family.options:
        return [True] * num_layers
    listed = fields.per_layer("no_rope_layers", num_layers, (0, 1))  # 1 is rotated, whatever the name says
    if listed is not None:
        return [bool(one) for one in listed]
    interval = fields.count("no_rope_layer_interval")
    return [(layer + 1) % interval != 0 for layer in range(num_layers)]


def _windows(fields: Fields, family: Family, rotated: list[bool]) -> list[int | None]:
    """The window of each layer: as `layer_types` lists them, else by the pattern of the family."""
    options, num_layers = family.options, len(rotated)
    unused = "use_sliding_window" in options and not fields.flag("use_sliding_window")
    if "sliding_window" not in options or fields.values.get("sliding_window") is None or unused:
        return [None] * num_layers
    window = fields.count("sliding_window")
    listed = fields.per_layer("layer_types", num_layers, (_SLIDING, _FULL)) if "layer_types" in options else None
    if listed is not None:
        sliding = [kind == _SLIDING for kind in listed]
    elif "sliding_window_pattern" in options:
        pattern = fields.count("sliding_window_pattern")
        sliding = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    elif "max_window_layers" in options:
        sliding = [layer >= fields.count("max_window_layers", least=0) for layer in range(num_layers)]
    elif "no_rope_layers" in options:
        sliding = [not one for one in rotated]
    else:
        sliding = [True] * num_layers
    return [window if one else None for one in sliding]


def _check_heads(path: Path, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{path}: num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads})."
        )
    if head_dim % 2:
        raise ConfigError(f"{path}: head_dim ({head_dim}) must be even.")
