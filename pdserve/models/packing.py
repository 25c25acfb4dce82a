"""Packs a checkpoint's tensors into one file of the cache, once a machine, in the dtype and form that is served.

The file records what it was made from (path, size and time of each source file, and the config), and is made again when
that changes or when its own bytes are damaged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from pdserve.kernels.quantised import Bits, fits, packed_shapes
from pdserve.models.checkpoint import Tensors, open_checkpoint
from pdserve.models.config import ModelConfig
from pdserve.models.packed import Damaged, Entries, Packed, Shape, map_packed, tensor_bytes, write_packed
from pdserve.models.quantise import Levels, quantise
from pdserve.models.weight_format import WeightFormat
from pdserve.models.weight_parts import Part, weight_parts

PACK_TIMEOUT_S = 1800.0
SCALES = ".scales"  # of a quantised weight, after its name
_FORMAT = 1
_QUANTISED_FORMAT = 1
_OF_EXPERTS = ("router", "experts_gate_up", "experts_down", "shared_gate")

_log = logging.getLogger(__name__)


def ensure_packed(
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
    parts = weight_parts(config)
    digest = sha256(config_stamp(config).encode())

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


def _bits(checkpoint: Tensors, part: Part, weight_format: WeightFormat) -> Bits | None:
    """What a part is kept in; None: in the serving dtype."""
    if weight_format == "dense" or part.name.endswith(_OF_EXPERTS) or not fits(part.shape):
        return None
    if weight_format == "gguf":
        kept = [checkpoint.bits(name) for name in part.sources]
        return None if None in kept else 8 if 8 in kept else 4
    # The table of embeddings stays in 8 bits: a token reads one row of it, and as a head it is the most sensitive.
    return 4 if weight_format == "int4" and part.name != "embedding" else 8


def _read(
    checkpoint: Tensors, part: Part, bits: Bits | None, dtype: torch.dtype, weight_format: WeightFormat
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


def _entries(parts: list[Part], bits: dict[str, Bits | None], dtype: torch.dtype) -> Entries:
    entries: dict[str, tuple[Shape, torch.dtype]] = {}
    for part in parts:
        kept = bits[part.name]
        if kept is None:
            entries[part.name] = (part.shape, dtype)
            continue
        data, scales = packed_shapes(part.shape, kept)
        entries[part.name] = (data, torch.uint8)
        entries[part.name + SCALES] = (scales, torch.float16)
    return entries


def _map_current(path: Path, source: str) -> Packed | None:
    """The packed file, or None where there is none, it is damaged, or it was made from something else."""
    try:
        packed = map_packed(path)
    except (FileNotFoundError, Damaged):
        return None
    return packed if packed.metadata.get("source") == source else None


def _source_stamp(files: tuple[Path, ...], config: ModelConfig, weight_format: WeightFormat) -> str:
    stats = [(str(file.resolve()), file.stat()) for file in files]
    listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    kept = [] if weight_format == "dense" else [weight_format, _QUANTISED_FORMAT]
    return json.dumps([_FORMAT, listed, config_stamp(config), *kept])


def config_stamp(config: ModelConfig) -> str:
    """The numbers that shape the KV; which tokens end a text is not among them."""
    numbers = asdict(config)
    if config.experts is None:
        del numbers["experts"]  # files packed before there were any stay valid
    for name in ("bos_token_id", "eos_token_ids", "max_position_embeddings"):
        del numbers[name]
    return json.dumps(numbers, sort_keys=True)
