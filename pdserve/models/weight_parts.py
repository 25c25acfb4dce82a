"""Which tensors a model has, what they are called in a checkpoint, and which of them are laid one below the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pdserve.models.config import ModelConfig
from pdserve.models.packed import Shape


@dataclass(frozen=True, slots=True)
class Part:
    """A packed tensor: the source tensors whose rows are laid one after the other, with the rows of each."""

    name: str
    sources: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int | None  # None for a vector

    @property
    def shape(self) -> Shape:
        return (sum(self.rows),) if self.columns is None else (sum(self.rows), self.columns)

    def source_shape(self, index: int) -> Shape:
        return (self.rows[index],) if self.columns is None else (self.rows[index], self.columns)


def weight_parts(config: ModelConfig) -> list[Part]:
    """The packed tensors in file order, which is the order of use."""
    hidden = config.hidden_size
    parts = [Part("embedding", ("model.embed_tokens.weight",), (config.vocab_size,), hidden)]
    for i in range(config.num_layers):
        parts += _layer_parts(config, i, f"layers.{i}.", f"model.layers.{i}.")
    parts.append(Part("final_norm", ("model.norm.weight",), (hidden,), None))
    if not config.tie_word_embeddings:
        parts.append(Part("head", ("lm_head.weight",), (config.vocab_size,), hidden))
    return parts


def _layer_parts(config: ModelConfig, layer: int, name: str, source: str) -> list[Part]:
    """`name` and `source` begin the names of the layer's tensors in the packed file and in the checkpoint."""
    hidden, q, kv = config.hidden_size, config.q_size, config.kv_size
    fused = config.family.fused
    parts = [
        *_linear("qkv", ("qkv",) if fused else ("q", "k", "v"), "self_attn", (q, kv, kv), hidden, config.qkv_bias),
        *_linear("output", ("o",), "self_attn", (hidden,), q, config.output_bias),
        *_mlp_parts(config, layer),
        *(Part(norm, (f"{at}.weight",), (hidden,), None) for norm, at in config.family.norms.items()),
    ]
    if config.qk_norm is not None:
        q_size, k_size = (config.head_dim, config.head_dim) if config.qk_norm == "head" else (q, kv)
        parts.append(Part("q_norm", ("self_attn.q_norm.weight",), (q_size,), None))
        parts.append(Part("k_norm", ("self_attn.k_norm.weight",), (k_size,), None))
    return [
        Part(name + part.name, tuple(source + one for one in part.sources), part.rows, part.columns) for part in parts
    ]


def _mlp_parts(config: ModelConfig, layer: int) -> Iterator[Part]:
    experts, names = config.experts, config.family.experts
    at, inner, hidden = "mlp", config.intermediate_size, config.hidden_size
    if experts is not None and names is not None and experts.layers[layer]:
        each = [f"{names.at}.experts.{i}." for i in range(experts.count)]
        gate_up = tuple(f"{one}{name}.weight" for one in each for name in (names.gate, names.up))
        down = tuple(f"{one}{names.down}.weight" for one in each)
        yield Part("router", (f"{names.at}.gate.weight",), (experts.count,), hidden)
        yield Part("experts_gate_up", gate_up, (experts.size,) * (2 * experts.count), hidden)
        yield Part("experts_down", down, (hidden,) * experts.count, experts.size)
        if not experts.shared_size:
            return
        yield Part("shared_gate", (f"{names.at}.shared_expert_gate.weight",), (1,), hidden)
        at, inner = f"{names.at}.shared_expert", experts.shared_size
    projections = ("gate_up",) if config.family.fused else ("gate", "up")
    yield from _linear("gate_up", projections, at, (inner, inner), hidden, config.mlp_bias)
    yield from _linear("down", ("down",), at, (hidden,), inner, config.mlp_bias)


def _linear(
    name: str, projections: tuple[str, ...], at: str, rows: tuple[int, ...], columns: int, bias: bool
) -> Iterator[Part]:
    """The weight of some projections that are laid one below the other, and its bias."""
    if len(projections) == 1:
        rows = (sum(rows),)
    yield Part(name, tuple(f"{at}.{x}_proj.weight" for x in projections), rows, columns)
    if bias:
        yield Part(f"{name}_bias", tuple(f"{at}.{x}_proj.bias" for x in projections), rows, None)
