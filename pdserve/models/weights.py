"""The weights as the decoder uses them: projections fused, in the serving dtype, mapped and shared.

A Hugging Face folder is packed once per machine into the cache; every worker maps that file. The packed file records
what it was made from (path, size and time of each source file, and the config), and is made again when that changes or
when its own bytes are damaged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from kvstore.layout import KvDtype
from pdserve.errors import ConfigError
from pdserve.kernels.base import Weight
from pdserve.kernels.quantised import Bits, QuantisedWeight, fits, packed_shapes
from pdserve.models.checkpoint import Tensors, open_checkpoint
from pdserve.models.config import ModelConfig
from pdserve.models.experts import ExpertWeights
from pdserve.models.folder import weight_files
from pdserve.models.packed import Damaged, Entries, Packed, Shape, map_packed, tensor_bytes, write_packed
from pdserve.models.quantise import Levels, quantise
from pdserve.models.weight_format import WeightFormat

TORCH_DTYPES: dict[KvDtype, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "fp8_e4m3": torch.float8_e4m3fn,  # of KV only
}
PACK_TIMEOUT_S = 1800.0
_FORMAT = 1
_QUANTISED_FORMAT = 1
_SCALES = ".scales"  # of a quantised weight, after its name
_OF_EXPERTS = ("router", "experts_gate_up", "experts_down", "shared_gate")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; H hidden, I intermediate, Q = num_heads * head_dim, K = num_kv_heads * head_dim."""

    attention_norm: Tensor | None  # [H], of what attention reads
    qkv: Weight  # [Q + 2 K, H], rows of q, then k, then v
    qkv_bias: Tensor | None  # [Q + 2 K]
    q_norm: Tensor | None  # [head_dim] or [Q], as the config's qk_norm says
    k_norm: Tensor | None  # [head_dim] or [K]
    output: Weight  # [H, Q]
    output_bias: Tensor | None  # [H]
    attention_post_norm: Tensor | None  # [H], of what attention adds to the residual
    mlp_norm: Tensor | None  # [H]
    gate_up: Weight | None  # [2 I, H], rows of gate, then up; beside experts that of the shared one, if there is one
    gate_up_bias: Tensor | None  # [2 I]
    down: Weight | None  # [H, I]
    down_bias: Tensor | None  # [H]
    mlp_post_norm: Tensor | None  # [H]
    experts: ExpertWeights | None


@dataclass(frozen=True, slots=True)
class Weights:
    identity: str  # hex; equal only for equal tensors under an equal config
    embedding: Weight  # [vocab, H]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [H]
    head: Weight  # [vocab, H]; where the config ties them the embedding itself


@dataclass(frozen=True, slots=True)
class _Part:
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


def open_weights(
    folder: Path, config: ModelConfig, dtype: KvDtype, cache_dir: Path, weight_format: WeightFormat = "dense"
) -> Weights:
    """Map the packed weights of `folder`, packing them first where that has not been done.

    Raises:
        ConfigError: a weight file is missing, truncated or corrupt; a tensor is missing or has another shape or an
            unsupported dtype; the cache cannot be written; the form of a GGUF file for another one.
    """
    files = weight_files(folder)
    if weight_format == "gguf" and files[0].suffix != ".gguf":
        raise ConfigError(f"Weights as the GGUF file has them need one; the model {folder} has safetensors.")
    name = sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    suffix = "" if weight_format == "dense" else f"-{weight_format}"
    path = cache_dir / "weights" / f"{name}-{dtype}{suffix}.safetensors"
    try:
        packed = _ensure_packed(path, files, config, TORCH_DTYPES[dtype], weight_format)
    except Timeout as error:
        raise ConfigError(f"Another process has held the lock of {path} for {PACK_TIMEOUT_S:.0f} s.") from error
    except Damaged as error:
        raise ConfigError(f"The packed weights changed as they were written: {error}; check the disk.") from error
    except OSError as error:
        raise ConfigError(f"The packed weights cannot be kept in {path.parent}: {error.strerror}.") from error
    return _assemble(config, packed.tensors, packed.metadata["identity"])


def random_weights(
    config: ModelConfig,
    dtype: KvDtype,
    seed: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Weights:
    """Weights of a plausible scale, for tests and benchmarks by shape: equal seeds give equal weights on a device."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for part in _parts(config):
        scale = 1.0 if part.columns is None else part.columns**-0.5
        tensors[part.name] = (torch.randn(part.shape, generator=generator, device=device) * scale).to(
            TORCH_DTYPES[dtype]
        )
        if part.name.endswith("norm"):
            tensors[part.name].fill_(1.0)
    identity = sha256(f"random {seed} {dtype} {_config_stamp(config)}".encode()).hexdigest()
    return _assemble(config, tensors, identity)


def weight_bytes(config: ModelConfig, dtype: KvDtype) -> int:
    """What dense weights of that shape take."""
    return sum(torch.Size(part.shape).numel() for part in _parts(config)) * TORCH_DTYPES[dtype].itemsize


def place(weights: Weights, device: torch.device) -> Weights:
    """Dense weights on another device, each copied there straight from the mapped file."""

    def there(weight: Weight | None) -> Tensor | None:
        assert not isinstance(weight, QuantisedWeight), "a device has dense weights"
        return None if weight is None else weight.to(device)

    def experts(here: ExpertWeights | None) -> ExpertWeights | None:
        if here is None:
            return None
        shared_gate = there(here.shared_gate)
        return ExpertWeights(here.router.to(device), here.gate_up.to(device), here.down.to(device), shared_gate)

    names = [name for name in LayerWeights.__dataclass_fields__ if name != "experts"]
    layers = tuple(
        LayerWeights(
            **{name: there(getattr(layer, name)) for name in names},  # type: ignore[arg-type]
            experts=experts(layer.experts),
        )
        for layer in weights.layers
    )
    embedding, final_norm = there(weights.embedding), weights.final_norm.to(device)
    head = embedding if weights.head is weights.embedding else there(weights.head)
    assert embedding is not None
    assert head is not None
    return Weights(weights.identity, embedding, layers, final_norm, head)


def _parts(config: ModelConfig) -> list[_Part]:
    """The packed tensors in file order, which is the order of use."""
    hidden = config.hidden_size
    parts = [_Part("embedding", ("model.embed_tokens.weight",), (config.vocab_size,), hidden)]
    for i in range(config.num_layers):
        parts += _layer_parts(config, i, f"layers.{i}.", f"model.layers.{i}.")
    parts.append(_Part("final_norm", ("model.norm.weight",), (hidden,), None))
    if not config.tie_word_embeddings:
        parts.append(_Part("head", ("lm_head.weight",), (config.vocab_size,), hidden))
    return parts


def _layer_parts(config: ModelConfig, layer: int, name: str, source: str) -> list[_Part]:
    """`name` and `source` begin the names of the layer's tensors in the packed file and in the checkpoint."""
    hidden, q, kv = config.hidden_size, config.q_size, config.kv_size
    fused = config.family.fused
    parts = [
        *_linear("qkv", ("qkv",) if fused else ("q", "k", "v"), "self_attn", (q, kv, kv), hidden, config.qkv_bias),
        *_linear("output", ("o",), "self_attn", (hidden,), q, config.output_bias),
        *_mlp_parts(config, layer),
        *(_Part(norm, (f"{at}.weight",), (hidden,), None) for norm, at in config.family.norms.items()),
    ]
    if config.qk_norm is not None:
        q_size, k_size = (config.head_dim, config.head_dim) if config.qk_norm == "head" else (q, kv)
        parts.append(_Part("q_norm", ("self_attn.q_norm.weight",), (q_size,), None))
        parts.append(_Part("k_norm", ("self_attn.k_norm.weight",), (k_size,), None))
    return [
        _Part(name + part.name, tuple(source + one for one in part.sources), part.rows, part.columns) for part in parts
    ]


def _mlp_parts(config: ModelConfig, layer: int) -> Iterator[_Part]:
    experts, names = config.experts, config.family.experts
    at, inner, hidden = "mlp", config.intermediate_size, config.hidden_size
    if experts is not None and names is not None and experts.layers[layer]:
        each = [f"{names.at}.experts.{i}." for i in range(experts.count)]
        gate_up = tuple(f"{one}{name}.weight" for one in each for name in (names.gate, names.up))
        down = tuple(f"{one}{names.down}.weight" for one in each)
        yield _Part("router", (f"{names.at}.gate.weight",), (experts.count,), hidden)
        yield _Part("experts_gate_up", gate_up, (experts.size,) * (2 * experts.count), hidden)
        yield _Part("experts_down", down, (hidden,) * experts.count, experts.size)
        if not experts.shared_size:
            return
        yield _Part("shared_gate", (f"{names.at}.shared_expert_gate.weight",), (1,), hidden)
        at, inner = f"{names.at}.shared_expert", experts.shared_size
    projections = ("gate_up",) if config.family.fused else ("gate", "up")
    yield from _linear("gate_up", projections, at, (inner, inner), hidden, config.mlp_bias)
    yield from _linear("down", ("down",), at, (hidden,), inner, config.mlp_bias)


def _linear(
    name: str, projections: tuple[str, ...], at: str, rows: tuple[int, ...], columns: int, bias: bool
) -> Iterator[_Part]:
    """The weight of some projections that are laid one below the other, and its bias."""
    if len(projections) == 1:
        rows = (sum(rows),)
    yield _Part(name, tuple(f"{at}.{x}_proj.weight" for x in projections), rows, columns)
    if bias:
        yield _Part(f"{name}_bias", tuple(f"{at}.{x}_proj.bias" for x in projections), rows, None)


def _ensure_packed(
    path: Path, files: tuple[Path, ...], config: ModelConfig, dtype: torch.dtype, weight_format: WeightFormat
) -> Packed:
    source = _source_stamp(files, config, weight_format)
    packed = _map_current(path, source)
    if packed is not None:
        return packed
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock"), timeout=PACK_TIMEOUT_S):
        packed = _map_current(path, source)  # another process may have packed meanwhile
        if packed is not None:
            return packed
        _log.info("packing %s into %s, once for this machine", files[0].parent, path)
        _pack(path, files, config, dtype, weight_format, source)
        return map_packed(path)


def _pack(
    path: Path,
    files: tuple[Path, ...],
    config: ModelConfig,
    dtype: torch.dtype,
    weight_format: WeightFormat,
    source: str,
) -> None:
    parts = _parts(config)
    digest = sha256(_config_stamp(config).encode())

    def tensors(checkpoint: Tensors, bits: dict[str, Bits | None]) -> Iterator[Tensor]:
        for part in parts:
            for tensor in _read(checkpoint, part, bits[part.name], dtype, weight_format):
                digest.update(f"{part.name} {tensor.dtype} {tensor.shape}".encode())
                digest.update(tensor_bytes(tensor))
                yield tensor

    with open_checkpoint(files) as checkpoint:
        for part in parts:
            for i, name in enumerate(part.sources):
                checkpoint.check(name, part.source_shape(i))
        bits = {part.name: _bits(checkpoint, part, weight_format) for part in parts}
        entries = _entries(parts, bits, dtype)
        metadata = lambda: {"source": source, "identity": digest.hexdigest()}  # noqa: E731
        write_packed(path, entries, tensors(checkpoint, bits), metadata)


def _bits(checkpoint: Tensors, part: _Part, weight_format: WeightFormat) -> Bits | None:
    """What a part is kept in; None: in the serving dtype."""
    if weight_format == "dense" or part.name.endswith(_OF_EXPERTS) or not fits(part.shape):
        return None
    if weight_format == "gguf":
        kept = [checkpoint.bits(name) for name in part.sources]
        return None if None in kept else 8 if 8 in kept else 4
    # The table of embeddings stays in 8 bits: a token reads one row of it, and as a head it is the most sensitive.
    return 4 if weight_format == "int4" and part.name != "embedding" else 8


def _read(
    checkpoint: Tensors, part: _Part, bits: Bits | None, dtype: torch.dtype, weight_format: WeightFormat
) -> tuple[Tensor, ...]:
    """The tensors of a part as the packed file has them: one, or data and scales."""
    if bits is None:
        pieces = [checkpoint.read(name).to(dtype) for name in part.sources]
        return (torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous(),)
    if weight_format == "gguf":
        levels = [checkpoint.levels(name) for name in part.sources]
        made = [piece if piece.bits == bits else quantise(piece.values(), bits) for piece in levels]
    else:
        made = [quantise(checkpoint.read(name), bits) for name in part.sources]
    weight = Levels(torch.cat([x.levels for x in made]), torch.cat([x.scales for x in made])).pack()
    return weight.data, weight.scales


def _entries(parts: list[_Part], bits: dict[str, Bits | None], dtype: torch.dtype) -> Entries:
    entries: dict[str, tuple[Shape, torch.dtype]] = {}
    for part in parts:
        kept = bits[part.name]
        if kept is None:
            entries[part.name] = (part.shape, dtype)
            continue
        data, scales = packed_shapes(part.shape, kept)
        entries[part.name] = (data, torch.uint8)
        entries[part.name + _SCALES] = (scales, torch.float16)
    return entries


def _map_current(path: Path, source: str) -> Packed | None:
    """The packed file, or None where there is none, it is damaged, or it was made from something else."""
    try:
        packed = map_packed(path)
    except (FileNotFoundError, Damaged):
        return None
    return packed if packed.metadata.get("source") == source else None


def _assemble(config: ModelConfig, tensors: dict[str, Tensor], identity: str) -> Weights:
    def weight(name: str) -> Weight | None:
        tensor, scales = tensors.get(name), tensors.get(name + _SCALES)
        return tensor if tensor is None or scales is None else QuantisedWeight(tensor, scales)

    def experts(layer: str) -> ExpertWeights | None:
        router, count = tensors.get(f"{layer}router"), config.experts.count if config.experts is not None else 0
        if router is None:
            return None
        gate_up, down = tensors[f"{layer}experts_gate_up"], tensors[f"{layer}experts_down"]
        shared_gate = tensors.get(f"{layer}shared_gate")
        gate_up, down = gate_up.view(count, -1, config.hidden_size), down.view(count, config.hidden_size, -1)
        return ExpertWeights(router, gate_up, down, shared_gate)

    fields = [field for field in LayerWeights.__dataclass_fields__ if field != "experts"]
    layers = tuple(
        LayerWeights(
            **{field: weight(f"layers.{i}.{field}") for field in fields},  # type: ignore[arg-type]
            experts=experts(f"layers.{i}."),
        )
        for i in range(config.num_layers)
    )
    embedding, head = weight("embedding"), weight("head")
    assert embedding is not None
    return Weights(identity, embedding, layers, tensors["final_norm"], embedding if head is None else head)


def _source_stamp(files: tuple[Path, ...], config: ModelConfig, weight_format: WeightFormat) -> str:
    stats = [(str(file.resolve()), file.stat()) for file in files]
    listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    kept = [] if weight_format == "dense" else [weight_format, _QUANTISED_FORMAT]
    return json.dumps([_FORMAT, listed, _config_stamp(config), *kept])


def _config_stamp(config: ModelConfig) -> str:
    """The numbers that shape the KV; which tokens end a text is not among them."""
    numbers = asdict(config)
    if config.experts is None:
        del numbers["experts"]  # files packed before there were any stay valid
    for name in ("bos_token_id", "eos_token_ids", "max_position_embeddings"):
        del numbers[name]
    return json.dumps(numbers, sort_keys=True)
