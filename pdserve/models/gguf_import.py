"""From a GGUF file to what serving reads: a Hugging Face style folder.

Needs `gguf`, `tokenizers` and torch, so it is imported where a file is really read, not at every start.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pdserve.models.folder import (
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    WEIGHTS_GGUF,
)
from pdserve.models.gguf_config import gguf_config, token_ids
from pdserve.models.gguf_file import GgufFile
from pdserve.models.gguf_tokenizer import gguf_tokenizer, gguf_tokenizer_config

Progress = Callable[[float], None]  # the finished fraction, 0 to 1


def describe(source: Path, folder: Path) -> None:
    """Write config and tokeniser of the GGUF file `source` into the existing `folder`, with a link to its weights.

    A tokenizer.json beside the file, with its config and chat template, goes before what the file says.

    Raises:
        ConfigError: the file is damaged, or holds a model or a tokeniser that is not supported.
    """
    with GgufFile(source) as file:
        _write_config(file, folder)
        beside = [source.parent / name for name in (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE)]
        if beside[0].is_file():
            for path in filter(Path.is_file, beside):
                shutil.copyfile(path, folder / path.name)
        else:
            _write_tokenizer(file, folder)
    (folder / WEIGHTS_GGUF).symlink_to(source.resolve())


def convert(source: Path, folder: Path, progress: Progress) -> None:
    """Write config, tokeniser and bfloat16 weights of the GGUF file `source` into the existing `folder`.

    Raises:
        ConfigError: as `describe`.
    """
    with GgufFile(source) as file:
        _write_config(file, folder)
        _write_tokenizer(file, folder)
        tensors, names = {}, file.names()
        for count, name in enumerate(names, start=1):
            tensors[name] = file.read(name).to(torch.bfloat16)
            progress(count / len(names))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _write_config(file: GgufFile, folder: Path) -> None:
    _write_json(folder / CONFIG, gguf_config(file))
    _write_json(folder / GENERATION_CONFIG, token_ids(file))


def _write_tokenizer(file: GgufFile, folder: Path) -> None:
    _write_json(folder / TOKENIZER_CONFIG, gguf_tokenizer_config(file))
    gguf_tokenizer(file).save(str(folder / TOKENIZER))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
