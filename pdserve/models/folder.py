"""What a usable model folder holds: config.json, tokenizer.json, and weights in safetensors, whole or sharded, or GGUF.

Weights in pickle-based formats (`*.bin`, `*.pt`) are never read: loading one runs code from the file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pdserve.errors import ConfigError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
WEIGHTS_GGUF = "model.gguf"
CHAT_TEMPLATE = "chat_template.jinja"


def check_folder(folder: Path, *, weights: bool = True) -> None:
    """Refuse a folder that lacks a file which serving needs; `weights`: from there.

    Raises:
        ConfigError: one sentence that names the folder and what is missing.
    """
    if not folder.is_dir():
        raise ConfigError(f"The model folder {folder} does not exist or is not a folder.")
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise ConfigError(f"The model folder {folder} has no {name}; a Hugging Face style folder is needed.")
    if weights:
        weight_files(folder)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of `folder`, in the order of their names, or its one GGUF file.

    Raises:
        ConfigError: there are none, or the index is invalid or names a file that is not there.
    """
    whole = folder / WEIGHTS
    if whole.is_file():
        return (whole,)
    if (folder / WEIGHTS_GGUF).is_file():
        return (folder / WEIGHTS_GGUF,)
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        raise ConfigError(
            f"The model folder {folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX};"
            " only weights in safetensors and GGUF are supported."
        )
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index} has no weight_map from tensor names to files.")
    names = set()
    for name in weight_map.values():
        # A path would lead out of the folder.
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{index} names {name!r}, which is not a file name.")
        names.add(name)
    files = tuple(folder / name for name in sorted(names))
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{index} names {file.name}, which is missing from the folder.")
    return files


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def sync(path: Path) -> None:
    """Make a file's bytes, or the renames in a folder, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
