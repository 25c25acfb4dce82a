"""Packed weights are the checkpoint's, shared read-only by all processes, and never damaged ones."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdserve.errors import ConfigError
from pdserve.models import packing
from pdserve.models.config import ModelConfig, load_config
from pdserve.models.weights import Weights, open_weights


@pytest.fixture
def folder(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of its own for each test, to be damaged."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in make_checkpoint(attention_bias=True).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def config(folder: Path) -> ModelConfig:
    return load_config(folder)


def packed_file(cache: Path) -> Path:
    (file,) = (cache / "weights").glob("*.safetensors")
    return file


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the checkpoint."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name].clone() for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def test_projections_are_fused_in_order(folder: Path, config: ModelConfig, tmp_path: Path) -> None:
    source = load_file(folder / "model.safetensors")
    weights = open_weights(folder, config, "float32", tmp_path)
    for i, layer in enumerate(weights.layers):
        prefix = f"model.layers.{i}"
        attention = [source[f"{prefix}.self_attn.{x}_proj.weight"] for x in "qkv"]
        assert torch.equal(layer.qkv, torch.cat(attention))
        biases = [source[f"{prefix}.self_attn.{x}_proj.bias"] for x in "qkv"]
        assert layer.qkv_bias is not None
        assert torch.equal(layer.qkv_bias, torch.cat(biases))
        mlp = [source[f"{prefix}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        assert torch.equal(layer.gate_up, torch.cat(mlp))
        assert layer.gate_up_bias is None
        assert torch.equal(layer.attention_norm, source[f"{prefix}.input_layernorm.weight"])
    assert torch.equal(weights.head, source["lm_head.weight"])


def test_tied_head_is_the_embedding(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint(tie_word_embeddings=True)
    weights = open_weights(folder, load_config(folder), "bfloat16", tmp_path)
    assert weights.head is weights.embedding
    assert weights.embedding.dtype == torch.bfloat16


def test_second_open_maps_without_packing(
    folder: Path, config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_weights(folder, config, "float32", tmp_path)
    monkeypatch.setattr(packing, "_pack", None)  # a call would raise
    assert open_weights(folder, config, "float32", tmp_path).identity == first.identity


def test_sharded_checkpoint_has_the_identity_of_the_whole(folder: Path, config: ModelConfig, tmp_path: Path) -> None:
    whole = open_weights(folder, config, "float32", tmp_path)
    shard(folder)
    sharded = open_weights(folder, config, "float32", tmp_path)
    assert sharded.identity == whole.identity
    assert torch.equal(sharded.layers[1].down, whole.layers[1].down)


def test_identity_follows_tensors_and_the_numbers_that_shape_kv(
    folder: Path, config: ModelConfig, tmp_path: Path
) -> None:
    def identity(config: ModelConfig) -> str:
        return open_weights(folder, config, "float32", tmp_path).identity

    first = identity(config)
    assert identity(replace(config, ropes=(replace(config.ropes[0], theta=5.0),))) != first
    assert identity(replace(config, eos_token_ids=(5,))) == first
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3, 4].add_(1.0))
    assert identity(config) != first


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: data[:-1], "truncated or not a safetensors file"),
        (lambda data: data[:100], "truncated or not a safetensors file"),
        (lambda data: b"", "truncated or not a safetensors file"),
        (lambda data: b"\xff" * len(data), "truncated or not a safetensors file"),
    ],
)
def test_damaged_checkpoint_is_refused(
    folder: Path, config: ModelConfig, tmp_path: Path, damage: Callable[[bytes], bytes], sentence: str
) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=sentence):
        open_weights(folder, config, "float32", tmp_path)
    assert not list((tmp_path / "weights").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks the tensor model.norm.weight"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)}), r"lm_head.weight has shape \[2, 2\]"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}),
            "stored as I8; supported: BF16, F16, F32",
        ),
    ],
)
def test_checkpoint_that_contradicts_the_config_is_refused(
    folder: Path,
    config: ModelConfig,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], object],
    sentence: str,
) -> None:
    rewrite(folder, change)
    with pytest.raises(ConfigError, match=sentence):
        open_weights(folder, config, "float32", tmp_path)


@pytest.mark.parametrize("place", [0, 20, 200, -1])
def test_damaged_packed_file_is_packed_again(folder: Path, config: ModelConfig, tmp_path: Path, place: int) -> None:
    before = open_weights(folder, config, "float32", tmp_path)
    path = packed_file(tmp_path)
    good = path.read_bytes()
    bad = bytearray(good)
    bad[place] ^= 0x10
    path.unlink()  # `before` still maps the good one
    path.write_bytes(bad)
    assert open_weights(folder, config, "float32", tmp_path).identity == before.identity
    assert path.read_bytes() == good


@pytest.mark.parametrize("size_bytes", [0, 7, 8, 1000])
def test_truncated_packed_file_is_packed_again(
    folder: Path, config: ModelConfig, tmp_path: Path, size_bytes: int
) -> None:
    open_weights(folder, config, "float32", tmp_path)
    path = packed_file(tmp_path)
    good = path.read_bytes()
    path.unlink()
    path.write_bytes(good[:size_bytes])
    open_weights(folder, config, "float32", tmp_path)
    assert path.read_bytes() == good


def test_changed_checkpoint_is_packed_again(folder: Path, config: ModelConfig, tmp_path: Path) -> None:
    before = open_weights(folder, config, "float32", tmp_path)
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].zero_())
    after = open_weights(folder, config, "float32", tmp_path)
    assert after.head.abs().sum() == 0
    assert before.head.abs().sum() > 0  # a worker that serves the old ones goes on with them


def test_failed_packing_leaves_no_file_under_the_name(
    folder: Path, config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            open_weights(folder, config, "float32", tmp_path)
        assert not list((tmp_path / "weights").glob("*.safetensors"))
    open_weights(folder, config, "float32", tmp_path)
    assert not list((tmp_path / "weights").glob("*.partial"))


def test_concurrent_opens_pack_once(
    folder: Path, config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs: list[int] = []
    pack = packing._pack
    monkeypatch.setattr(packing, "_pack", lambda *args: (packs.append(1), pack(*args)))
    opened: list[Weights] = []
    threads = [
        threading.Thread(target=lambda: opened.append(open_weights(folder, config, "float32", tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({weights.identity for weights in opened}) == 1
    assert (len(opened), len(packs)) == (4, 1)


MAP_AND_REPORT = """
import sys
from pathlib import Path
from pdserve.models.packed import map_packed
packed = map_packed(Path(sys.argv[1]))
entry, found = "", {}
for line in open("/proc/self/smaps"):
    if line.rstrip().endswith(sys.argv[1]):
        entry = line.split()[1]
    elif entry and line[0].isupper():
        name, value = line.split(":")
        if value.endswith("kB\\n"):
            found[name] = int(value.split()[0])
        if name == "VmFlags":
            break
print(entry, found["Rss"], found["Private_Clean"], found["Private_Dirty"], found["Shared_Clean"])
"""


def test_processes_share_the_mapping_read_only(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint(vocab_size=20_000)  # 10 MB, so that the size shows
    mapped = open_weights(folder, load_config(folder), "float32", tmp_path)
    path = packed_file(tmp_path)
    command = [sys.executable, "-c", MAP_AND_REPORT, str(path)]
    report = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    rss, private_clean, private_dirty, shared = map(int, report[1:])
    assert report[0] == "r--s"
    assert private_dirty == 0
    assert rss * 1024 >= 0.9 * path.stat().st_size
    assert shared >= 0.9 * rss, private_clean
    assert mapped.embedding.isfinite().all()
