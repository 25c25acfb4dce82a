"""The weights as the decoder uses them: projections fused, in the serving dtype, mapped and shared.

A checkpoint is packed once per machine into the cache (`pdserve.models.packing`); every worker maps that file.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from filelock import Timeout
from torch import Tensor

from kvstore.layout import KvDtype
from pdserve.errors import ConfigError
from pdserve.kernels.base import Weight
from pdserve.kernels.quantised import QuantisedWeight
from pdserve.models.config import ModelConfig
from pdserve.models.experts import ExpertWeights
from pdserve.models.folder import weight_files
from pdserve.models.packed import Damaged
from pdserve.models.packing import PACK_TIMEOUT_S, SCALES, config_stamp, ensure_packed
from pdserve.models.weight_format import WeightFormat
from pdserve.models.weight_parts import weight_parts

TORCH_DTYPES: dict[KvDtype, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "fp8_e4m3": torch.float8_e4m3fn,  # of KV only
}


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
        packed = ensure_packed(path, files, config, TORCH_DTYPES[dtype], weight_format)
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
    for part in weight_parts(config):
        scale = 1.0 if part.columns is None else part.columns**-0.5
        tensors[part.name] = (torch.randn(part.shape, generator=generator, device=device) * scale).to(
            TORCH_DTYPES[dtype]
        )
        if part.name.endswith("norm"):
            tensors[part.name].fill_(1.0)
    identity = sha256(f"random {seed} {dtype} {config_stamp(config)}".encode()).hexdigest()
    return _assemble(config, tensors, identity)


def weight_bytes(config: ModelConfig, dtype: KvDtype) -> int:
    """What dense weights of that shape take."""
    return sum(torch.Size(part.shape).numel() for part in weight_parts(config)) * TORCH_DTYPES[dtype].itemsize


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


def _assemble(config: ModelConfig, tensors: dict[str, Tensor], identity: str) -> Weights:
    def weight(name: str) -> Weight | None:
        tensor, scales = tensors.get(name), tensors.get(name + SCALES)
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
