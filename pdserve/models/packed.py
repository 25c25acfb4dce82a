"""A file of tensors that processes map read-only and share: safetensors, with a checksum in its metadata.

The writer streams one tensor at a time, so packing needs the memory of one, and the file appears under its name whole
or not at all. Tensor data begins at a multiple of 64 bytes. Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from pdserve.models.folder import sync

_LENGTH = struct.Struct("<Q")
_ALIGN_BYTES = 64
_CODES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16", torch.uint8: "U8"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_CHECKSUM = "data_xxh3_64"
_NO_CHECKSUM = "0" * 16

Shape = tuple[int, ...]
Entries = Mapping[str, tuple[Shape, torch.dtype]]  # by name, in file order


class Damaged(Exception):
    """The file is not one that `write_packed` finished, or its bytes have changed since."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Tensors over a read-only shared mapping: writing to one is a segmentation fault, so no process can alter them."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def write_packed(
    path: Path,
    entries: Entries,
    tensors: Iterable[Tensor],
    metadata: Callable[[], dict[str, str]],
) -> None:
    """Write `tensors`, in the order of `entries`, to `path`; atomic.

    Args:
        metadata: called before and after the tensors were taken; the result may differ in its values but not in its
            size, so that it can hold digests of what went by.

    Raises:
        OSError: the disk is full or not writable.
    """
    temporary = path.with_name(path.name + ".partial")  # one name: what a killed writer left is overwritten
    checksum = xxhash.xxh3_64()
    with temporary.open("wb") as file:
        head = _header(entries, {**metadata(), _CHECKSUM: _NO_CHECKSUM})
        file.write(head)
        for (name, entry), tensor in zip(entries.items(), tensors, strict=True):
            assert (tensor.shape, tensor.dtype) == entry, name
            data = tensor_bytes(tensor)
            checksum.update(data)
            file.write(data)
        final = _header(entries, {**metadata(), _CHECKSUM: checksum.hexdigest()})
        assert len(final) == len(head), "metadata must keep its size"
        file.seek(0)
        file.write(final)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def map_packed(path: Path) -> Packed:
    """Map a file of `write_packed` and verify its checksum, which reads it once.

    Raises:
        Damaged: truncated, altered, or not such a file.
        FileNotFoundError: there is none.
    """
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes <= _LENGTH.size:
            raise Damaged(f"{path} is empty")
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        (head_bytes,) = _LENGTH.unpack_from(view)
        header = json.loads(bytes(view[_LENGTH.size : _LENGTH.size + head_bytes]))
        metadata = header.pop("__metadata__")
        data = view[_LENGTH.size + head_bytes :]
        if xxhash.xxh3_64_hexdigest(data) != metadata[_CHECKSUM]:
            raise Damaged(f"{path} does not match its checksum")
        tensors = {name: _tensor(data, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RuntimeError) as error:
        raise Damaged(f"{path} has no valid header") from error
    return Packed(metadata, tensors)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")


def _header(entries: Entries, metadata: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    begin = 0
    for name, (shape, dtype) in entries.items():
        end = begin + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % _ALIGN_BYTES)
    return _LENGTH.pack(len(text)) + text


def _tensor(data: memoryview, entry: dict[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "not writable" is the point
        flat = torch.frombuffer(data[begin:end], dtype=_DTYPES[entry["dtype"]])
    return flat.view(entry["shape"])
