"""A GGUF file as a checkpoint: its fields, and its tensors under the names and in the form of Hugging Face.

Files of some families store the rows of q and k with the two elements of a rotated pair next to each other; here the
first elements of all pairs come first, then the second ones. Files of Gemma store the weights of norms with the 1 that
is added to them.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from pdserve.errors import ConfigError
from pdserve.kernels.quantised import Bits
from pdserve.models.families import FAMILIES
from pdserve.models.gguf_levels import bits_of, levels
from pdserve.models.gguf_types import ARCHITECTURES, TENSOR_TYPES
from pdserve.models.quantise import Levels

_READ_ERRORS = (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError)
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {
    "attn_norm": "attention_norm",
    "post_attention_norm": "attention_post_norm",
    "ffn_norm": "mlp_norm",
    "post_ffw_norm": "mlp_post_norm",
}


class GgufFile:
    """The fields and tensors of one file; the counterpart of `Checkpoint`. Use as a context manager.

    Raises:
        ConfigError: the file is damaged, of an unsupported architecture, or a part of a split one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = GGUFReader(path)
        except _READ_ERRORS as error:
            raise ConfigError(f"{path} is truncated or not a GGUF file: {error}.") from error
        self._fields = reader.fields
        name = self.field("general.architecture")
        if name not in ARCHITECTURES:
            raise ConfigError(f"{path} holds the architecture {name!r}; supported: {', '.join(ARCHITECTURES)}.")
        if (self.field("split.count") or 1) > 1:
            raise ConfigError(f"{path} is one part of a split file; join them with llama-gguf-split --merge.")
        if self.shape_field("expert_count"):
            raise ConfigError(f"{path} holds a mixture of experts; supported: dense models.")
        self.architecture = ARCHITECTURES[name]
        self._family = FAMILIES[self.architecture]
        self.own = {tensor.name: tensor for tensor in reader.tensors}  # by the file's names
        self._tensors = {self._name(tensor.name): tensor for tensor in reader.tensors}

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensors, self.own = {}, {}  # with the last reference the mapping goes

    def field(self, name: str) -> Any:
        """A field's value, or None."""
        field = self._fields.get(name)
        try:
            return None if field is None else field.contents()
        except _READ_ERRORS as error:
            raise ConfigError(f"{self.path}: the field {name} cannot be read: {error}.") from error

    def shape_field(self, name: str) -> Any:
        """A field below the file's own architecture."""
        return self.field(f"{self.field('general.architecture')}.{name}")

    def names(self) -> list[str]:
        """Of the tensors, as Hugging Face has them; without those that belong to the rotation."""
        return [name for name in self._tensors if name.startswith(("model.", "lm_head."))]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """
        Raises:
            ConfigError: there is no such tensor, or it has another shape or an unsupported type.
        """
        tensor = self._find(name)
        found = tuple(int(size) for size in reversed(tensor.shape))
        if found != shape:
            raise ConfigError(f"{self.path}: {name} has shape {list(found)}, the config makes it {list(shape)}.")
        if tensor.tensor_type.name not in TENSOR_TYPES:
            raise ConfigError(
                f"{self.path}: {name} is stored as {tensor.tensor_type.name}; supported: {', '.join(TENSOR_TYPES)}."
            )

    def read(self, name: str) -> Tensor:
        """In bfloat16 or float16 where it is stored so, else in float32.

        Raises:
            ConfigError: it is missing or cannot be read.
        """
        tensor = self._find(name)
        try:
            values = _values(tensor)
        except _READ_ERRORS as error:
            raise ConfigError(f"{self.path}: {name} cannot be read: {error}.") from error
        if name.endswith("norm.weight") and self._family.norm_offset:
            return values.float() - self._family.norm_offset
        return self._in_our_order(name, values)

    def bits(self, name: str) -> Bits | None:
        """What a tensor is kept in where it stays quantised; None: dense."""
        return bits_of(self._find(name).tensor_type.name)

    def levels(self, name: str) -> Levels:
        """A tensor of which `bits` are not None.

        Raises:
            ConfigError: it is missing or cannot be read.
        """
        try:
            made = levels(self._find(name))
        except _READ_ERRORS as error:
            raise ConfigError(f"{self.path}: {name} cannot be read: {error}.") from error
        return Levels(self._in_our_order(name, made.levels), self._in_our_order(name, made.scales))

    def _in_our_order(self, name: str, values: Tensor) -> Tensor:
        """values [N, ...] with the rows of rotated pairs in two halves."""
        if self._family.gguf_rotates_pairs and ".self_attn.q_proj." in name:
            return _unpair(values, self.shape_field("attention.head_count"))
        if self._family.gguf_rotates_pairs and ".self_attn.k_proj." in name:
            return _unpair(values, self.shape_field("attention.head_count_kv"))
        return values

    def _find(self, name: str) -> ReaderTensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ConfigError(f"{self.path} lacks the tensor {name}, which the config asks for.")
        return tensor

    def _name(self, own: str) -> str:
        """The Hugging Face name of a tensor; its own where there is none."""
        base, _, suffix = own.rpartition(".")
        if base in _NAMES:
            return f"{_NAMES[base]}.{suffix}"
        if not base.startswith("blk."):
            return own
        _, layer, kind = base.split(".", 2)
        if kind in _NORMS:
            name = self._family.norms.get(_NORMS[kind], kind)
        else:
            name = "mlp.gate_up_proj" if kind == "ffn_up" and self._family.fused else _LAYER_NAMES.get(kind, kind)
        return f"model.layers.{layer}.{name}.{suffix}"


def _values(tensor: ReaderTensor) -> Tensor:
    if tensor.tensor_type.name == "BF16":
        shape = [int(size) for size in reversed(tensor.shape)]
        return torch.from_numpy(np.array(tensor.data).view(np.uint16)).view(torch.bfloat16).view(shape)
    if tensor.tensor_type.name in ("F32", "F16"):
        return torch.from_numpy(np.array(tensor.data))
    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))


def _unpair(values: Tensor, num_heads: int) -> Tensor:
    """[heads * D/2 pairs * 2, ...] -> [heads * 2 * D/2, ...]."""
    pairs = values.view(num_heads, -1, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)
