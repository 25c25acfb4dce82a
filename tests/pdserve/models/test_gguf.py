"""A GGUF file of each family and type gives the tensors, the numbers and the tokens that it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig

from pdserve.errors import ConfigError
from pdserve.kernels.quantised import QuantisedWeight
from pdserve.models.config import load_config
from pdserve.models.families import FAMILIES
from pdserve.models.gguf_file import GgufFile
from pdserve.models.gguf_types import TENSOR_TYPES
from pdserve.models.source import resolve_model
from pdserve.models.weights import open_weights

Array = np.ndarray[Any, Any]
LETTERS = [*"abcdefgh"]

# Per family: what differs from transformers' defaults, and what its GGUF files say beside the sizes.
FAMILY_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama": ({"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}),
    "SmolLM3": ({"num_hidden_layers": 5, "tie_word_embeddings": True}, {}),
    "Qwen2": ({"tie_word_embeddings": True}, {}),
    "Qwen3": ({"head_dim": 32}, {"attention.key_length": 32}),
    "Phi3": ({"sliding_window": 17}, {"attention.sliding_window": 17}),
    "Gemma2": (
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 9, "attn_logit_softcapping": 20.0},
        {
            "attention.key_length": 32,
            "attention.sliding_window": 9,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "Gemma3": (
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 7,
            "sliding_window": 9,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {
            "attention.key_length": 16,
            "attention.sliding_window": 9,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "Olmo2": ({}, {}),
    "Granite": (
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
        {"embedding_scale": 3.0, "attention.scale": 0.1, "residual_scale": 0.4, "logit_scale": 2.0},
    ),
}
# llama.cpp's names, from those of Hugging Face.
OWN_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def own_name(name: str, family: str) -> str:
    base, suffix = name.rsplit(".", 1)
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if base in fixed:
        return f"{fixed[base]}.{suffix}"
    _, _, layer, rest = base.split(".", 3)
    after = family.startswith("Gemma") or family == "Olmo2"
    names = OWN_NAMES | {"post_attention_layernorm": "post_attention_norm" if after else "ffn_norm"}
    return f"blk.{layer}.{names[rest]}.{suffix}"


def paired(rows: Array, heads: int) -> Array:
    """llama.cpp's order for some families: row i and row i + D/2 of a head become neighbours."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def add_tokenizer(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(LETTERS)
    writer.add_token_types([TokenType.NORMAL] * len(LETTERS))
    writer.add_token_merges([])


def write_gguf(
    path: Path, arch: str, fields: dict[str, Any], tensors: dict[str, Array], kind: str = "F32", tokens: bool = True
) -> None:
    """`tensors` under llama.cpp's names; vectors stay in F32 whatever `kind` is, as in real files."""
    writer = GGUFWriter(path, arch)
    for name, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](name if "." in name and name.startswith("split") else f"{arch}.{name}", value)
    if tokens:
        add_tokenizer(writer)
    for name, values in tensors.items():
        type_ = GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        writer.add_tensor(name, quantize(values, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sizes(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of every architecture, from a config.json."""
    return {
        "embedding_length": values["hidden_size"],
        "feed_forward_length": values["intermediate_size"],
        "block_count": values["num_hidden_layers"],
        "context_length": values["max_position_embeddings"],
        "attention.head_count": values["num_attention_heads"],
        "attention.head_count_kv": values["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": values["rms_norm_eps"],
    }


def as_gguf(checkpoint: Path, path: Path, family: str, fields: dict[str, Any], kind: str = "F32") -> None:
    """What llama.cpp's conversion makes of a checkpoint of transformers."""
    values = json.loads((checkpoint / "config.json").read_text())
    row = FAMILIES[values["architectures"][0]]
    heads = {"q_proj": values["num_attention_heads"], "k_proj": values["num_key_value_heads"]}
    tensors = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        array = tensor.numpy()
        part = name.split(".")[-2]
        if row.gguf_rotates_pairs and part in heads:
            array = paired(array, heads[part])
        if family.startswith("Gemma") and name.endswith("norm.weight"):
            array = array + 1
        tensors[own_name(name, family)] = array
    theta = values.get("rope_parameters", {}).get("rope_theta")
    rope = {} if theta is None else {"rope.freq_base": theta}
    write_gguf(path, row.gguf, {**sizes(values), **rope, **fields}, tensors, kind)


@pytest.mark.parametrize("family", FAMILY_CASES)
def test_a_file_of_each_family_is_the_checkpoint_it_was_made_from(
    family: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The same config and the same tensors, so the same logits as the folder, which equal transformers'."""
    changes, fields = FAMILY_CASES[family]
    checkpoint = make_checkpoint(family, **changes)
    as_gguf(checkpoint, tmp_path / "tiny.gguf", family, fields)
    folder = resolve_model(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert folder.name == "tiny"
    config, expected = load_config(folder), load_config(checkpoint)
    assert config == expected
    ours, theirs = (open_weights(at, config, "float32", tmp_path) for at in (folder, checkpoint))
    for mine, truth in zip(ours.layers, theirs.layers, strict=True):
        for name in mine.__dataclass_fields__:
            got, value = getattr(mine, name), getattr(truth, name)
            assert (got is None) == (value is None)
            if value is not None:
                torch.testing.assert_close(got, value, atol=2e-7, rtol=0)  # Gemma's 1 costs the last bits
    assert torch.equal(ours.embedding, theirs.embedding)
    assert torch.equal(ours.head, theirs.head)
    assert AutoConfig.from_pretrained(folder).architectures == [config.architecture]


def test_rotations_that_stretch_are_read(tmp_path: Path) -> None:
    short, long = [1.0 + i for i in range(4)], [2.0 + i for i in range(4)]
    tensors = {"token_embd.weight": np.zeros((8, 32), np.float32)}
    values = {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    values |= {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}

    def read(arch: str, fields: dict[str, Any], more: dict[str, list[float]]) -> Any:
        path = tmp_path / "rope.gguf"
        extra = {f"{name}.weight": np.array(factors, np.float32) for name, factors in more.items()}
        write_gguf(path, arch, {**sizes(values), **fields}, {**tensors, **extra})
        return load_config(resolve_model(path, tmp_path / "cache")).ropes[0]

    rope = read("llama", {"rope.freq_base": 5e5}, {"rope_freqs": short})
    assert (rope.kind, rope.short_factors, rope.long_factors) == ("longrope", tuple(short), tuple(short))
    assert (rope.theta, rope.amplitude) == (5e5, 1.0)
    fields = {"rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": 1.25}
    rope = read("phi3", fields, {"rope_factors_short": short, "rope_factors_long": long})
    assert (rope.short_factors, rope.long_factors, rope.original_max_positions) == (tuple(short), tuple(long), 16)
    assert rope.amplitude == 1.25
    fields = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    rope = read("qwen2", fields, {})
    assert (rope.kind, rope.factor, rope.original_max_positions) == ("yarn", 4.0, 16)
    rope = read("phi3", {"rope.dimension_count": 4}, {})
    assert (rope.kind, rope.dim) == ("default", 4)


def half(data: bytes) -> float:
    return float(np.frombuffer(data, np.float16)[0])


def scales_and_minima(packed: bytes) -> list[tuple[int, int]]:
    """The eight pairs of 6 bits of Q4_K and Q5_K."""
    out = []
    for i in range(8):
        if i < 4:
            out.append((packed[i] & 63, packed[i + 4] & 63))
        else:
            low, high = packed[i + 4], (packed[i - 4] >> 6, packed[i] >> 6)
            out.append((low & 15 | high[0] << 4, low >> 4 | high[1] << 4))
    return out


def q4_k(block: bytes) -> list[float]:
    d, least, pairs, nibbles = half(block[:2]), half(block[2:4]), scales_and_minima(block[4:16]), block[16:]
    out = []
    for i, (scale, minimum) in enumerate(pairs):
        part = nibbles[i // 2 * 32 : i // 2 * 32 + 32]
        out += [d * scale * (q >> 4 * (i % 2) & 15) - least * minimum for q in part]
    return out


def q5_k(block: bytes) -> list[float]:
    d, least, pairs = half(block[:2]), half(block[2:4]), scales_and_minima(block[4:16])
    high, nibbles = block[16:48], block[48:]
    out = []
    for i, (scale, minimum) in enumerate(pairs):
        part = nibbles[i // 2 * 32 : i // 2 * 32 + 32]
        for j, q in enumerate(part):
            value = (q >> 4 * (i % 2) & 15) | (high[j] >> i & 1) << 4
            out.append(d * scale * value - least * minimum)
    return out


def q6_k(block: bytes) -> list[float]:
    low, high, scales, d = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8), half(block[208:])
    out = []
    for i in range(256):
        part, within = divmod(i, 128)
        row, column = divmod(within, 32)
        nibble = low[part * 64 + row % 2 * 32 + column] >> 4 * (row // 2) & 15
        value = nibble | (high[part * 32 + column] >> 2 * row & 3) << 4
        out.append(d * int(scales[i // 16]) * (value - 32))
    return out


K_BLOCKS: dict[str, tuple[Callable[[bytes], list[float]], int, tuple[int, ...]]] = {
    # the reader, bytes of a block, where its half-precision numbers stand
    "Q4_K": (q4_k, 144, (0, 2)),
    "Q5_K": (q5_k, 176, (0, 2)),
    "Q6_K": (q6_k, 210, (208,)),
}
STEPS = {"Q8_0": 2 / 127, "Q4_0": 2 / 8, "Q4_1": 2 / 15, "Q5_0": 2 / 16, "Q5_1": 2 / 31}


def read_one(path: Path) -> Tensor:
    with GgufFile(path) as file:
        file.check("model.layers.0.mlp.down_proj.weight", (3, 512))
        return file.read("model.layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize("kind", [kind for kind in TENSOR_TYPES if kind not in K_BLOCKS])
def test_a_tensor_of_each_type_is_read(kind: str, tmp_path: Path) -> None:
    """Floating types exactly, the others to within a step of their grid."""
    values = np.random.default_rng(0).uniform(-1, 1, (3, 512)).astype(np.float32)
    write_gguf(tmp_path / "one.gguf", "llama", {}, {"blk.0.ffn_down.weight": values}, kind)
    got, truth = read_one(tmp_path / "one.gguf"), torch.from_numpy(values)
    exact = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if kind in exact:
        assert got.dtype == exact[kind]
        assert torch.equal(got, truth.to(exact[kind]))
    else:
        assert got.dtype == torch.float32
        assert 0 < (got - truth).abs().max() <= STEPS[kind]


@pytest.mark.parametrize("kind", K_BLOCKS)
def test_a_tensor_of_k_blocks_is_read(kind: str, tmp_path: Path) -> None:
    """Random blocks, read here number by number."""
    reader, size, halves = K_BLOCKS[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (3, 2, size), np.uint8)
    for at in halves:
        blocks[..., at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
    writer = GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("blk.0.ffn_down.weight", blocks.reshape(3, -1), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = torch.tensor([[v for block in row for v in reader(block.tobytes())] for row in blocks])
    torch.testing.assert_close(read_one(tmp_path / "one.gguf"), expected, atol=1e-5, rtol=1e-5)


def test_a_quantised_file_is_served_in_either_dtype(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("Qwen2", tie_word_embeddings=True)
    as_gguf(checkpoint, tmp_path / "tiny.gguf", "Qwen2", {}, "Q8_0")
    folder = resolve_model(tmp_path / "tiny.gguf", tmp_path / "cache")
    config = load_config(folder)
    truth = open_weights(checkpoint, config, "float32", tmp_path).layers[1].down
    for dtype, bound in (("float32", 0.01), ("bfloat16", 0.015)):
        assert 0 < (open_weights(folder, config, dtype, tmp_path).layers[1].down.float() - truth).abs().max() < bound


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_K", "Q6_K"])
def test_a_tensor_that_stays_packed_has_the_values_of_the_file(kind: str, tmp_path: Path) -> None:
    """Of four types exactly, but for scales of Q4_K in float16; others are rounded to 8 bits."""
    if kind in K_BLOCKS:
        _, size, halves = K_BLOCKS[kind]
        data = np.random.default_rng(0).integers(0, 256, (3, 2, size), np.uint8)
        for at in halves:
            data[..., at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
        data = data.reshape(3, -1)
    else:
        values = np.random.default_rng(0).uniform(-1, 1, (3, 512)).astype(np.float32)
        data = quantize(values, GGMLQuantizationType[kind])
    writer = GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("blk.0.ffn_down.weight", data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    name = "model.layers.0.mlp.down_proj.weight"
    with GgufFile(tmp_path / "one.gguf") as file:
        dense, bits, kept = file.read(name), file.bits(name), file.levels(name)
    assert bits == kept.bits == (4 if kind.startswith("Q4") else 8)
    off = {"Q4_K": 5e-4}.get(kind, 1e-6 if kind in ("Q8_0", "Q4_0", "Q4_1") else 5e-3)
    assert (kept.values() - dense).abs().max() <= off * dense.abs().max()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_a_file_that_stays_packed_is_the_model_that_it_was_dense(
    kind: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Rows of rotated pairs are reordered as packed; the table is kept once, whether tied or not."""
    for tied in (True, False):
        checkpoint = make_checkpoint("Llama", tie_word_embeddings=tied, vocab_size=144)
        as_gguf(checkpoint, tmp_path / f"{tied}.gguf", "Llama", {}, kind)
        folder = resolve_model(tmp_path / f"{tied}.gguf", tmp_path / "cache")
        config = load_config(folder)
        dense, kept = (open_weights(folder, config, "float32", tmp_path, name) for name in ("dense", "gguf"))
        assert (kept.head is kept.embedding) == tied
        for layer, truth in zip(kept.layers, dense.layers, strict=True):
            for name in ("qkv", "output", "gate_up", "down"):
                weight = getattr(layer, name)
                values = weight.values() if isinstance(weight, QuantisedWeight) else weight
                assert isinstance(weight, QuantisedWeight) == (kind != "F16")
                torch.testing.assert_close(values, getattr(truth, name), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("arch", "fields", "sentence"),
    [
        ("mamba", {}, "architecture 'mamba'; supported: llama, "),
        ("llama", {"expert_count": 8}, "mixture of experts; supported: dense"),
        ("llama", {"split.count": 2}, "one part of a split file"),
        ("llama", {"embedding_length": 32}, "lacks the field block_count"),
        (
            "llama",
            {
                "embedding_length": 32,
                "block_count": 2,
                "attention.head_count": 4,
                "attention.head_count_kv": [4, 2],
            },
            "num_key_value_heads differs from layer to layer",
        ),
    ],
)
def test_a_file_that_cannot_be_served_is_refused(
    arch: str, fields: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "x.gguf", arch, fields, {"token_embd.weight": np.zeros((8, 32), np.float32)})
    with pytest.raises(ConfigError, match=sentence) as caught:
        resolve_model(tmp_path / "x.gguf", tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_a_type_that_is_not_supported_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((3, 168), np.uint8), raw_dtype=GGMLQuantizationType.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"stored as Q2_K; supported: F32, .*Q6_K"):
        read_one(tmp_path / "one.gguf")


@pytest.mark.parametrize("keep", [0, 3, 40, -200])
def test_a_damaged_file_is_refused(keep: int, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    as_gguf(make_checkpoint("Qwen2"), path, "Qwen2", {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="truncated or not a GGUF file"):
        resolve_model(path, tmp_path / "cache")


TEXTS = ["abc abd", "  a  b", "it's 12345 cab!\n\n x", "äb 😀 c", "", "a<end>b"]


def write_tokens(path: Path, fields: dict[str, Any], tokens: list[str], kinds: list[TokenType]) -> None:
    writer = GGUFWriter(path, "llama")
    for name, value in fields.items():
        add = {int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"tokenizer.ggml.{name}", value)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    values = {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    values |= {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}
    for name, value in sizes(values).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{name}", value)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokenizer_of(path: Path, cache: Path) -> Tokenizer:
    return Tokenizer.from_file(str(resolve_model(path, cache) / "tokenizer.json"))


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentence_piece_tokens_are_those_of_its_scores(prefixed: bool, tmp_path: Path) -> None:
    """Against the tokeniser that such a vocabulary has in a Hugging Face folder, with its merges written by hand."""
    pieces = ["<unk>", "<s>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdit's!1"]
    merged = ["ab", "▁a", "bd", "abd", "▁abd"]  # the best score first
    tokens = [*dict.fromkeys(pieces), *merged]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    kinds += [TokenType.NORMAL] * (len(tokens) - len(kinds))
    first = len(tokens) - len(merged)
    scores = [0.0] * first + [-1.0 - i for i in range(len(merged))]
    fields = {"model": "llama", "scores": scores, "unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    write_tokens(tmp_path / "sp.gguf", fields | {"add_space_prefix": prefixed}, tokens, kinds)
    ours = tokenizer_of(tmp_path / "sp.gguf", tmp_path / "cache")

    merges = [("a", "b"), ("▁", "a"), ("b", "d"), ("ab", "d"), ("a", "bd"), ("▁a", "bd"), ("▁", "abd")]
    vocab = {token: i for i, token in enumerate(tokens)}
    theirs = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefixed else replace
    theirs.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    theirs.add_special_tokens(["<s>", "<end>"])
    for text in TEXTS:
        expected = theirs.encode(text).ids
        assert ours.encode(text).ids == [1, *expected]
        assert ours.encode(text, add_special_tokens=False).ids == expected
        decoded = ours.decode(expected, skip_special_tokens=False)
        if "<" not in text:
            assert decoded == text


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["it", "'s", " 12345", " Cab", "'", "S", "!", "\n\n", " x"]),
        ("smollm", ["it", "'s", " ", "1", "2", "3", "4", "5", " Cab", "'", "S", "!", "\n\n", " x"]),
        ("llama-bpe", ["it", "'s", " ", "123", "45", " Cab", "'S", "!\n\n", " x"]),
        ("qwen2", ["it", "'s", " ", "1", "2", "3", "4", "5", " Cab", "'S", "!\n\n", " x"]),
        ("gpt-4o", ["it's", " ", "123", "45", " Cab'S", "!\n\n", " x"]),
        ("tekken", ["it", "'s", " ", "1", "2", "3", "4", "5", " Cab", "'S", "!\n\n", " x"]),
    ],
)
def test_text_is_cut_into_words_as_the_file_names_it(pre: str, words: list[str], tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fields = {"model": "gpt2", "pre": pre, "merges": [f"{alphabet[0]} {alphabet[1]}"]}
    tokens = [*alphabet, alphabet[0] + alphabet[1]]
    write_tokens(tmp_path / "bpe.gguf", fields, tokens, [TokenType.NORMAL] * len(tokens))
    tokenizer = tokenizer_of(tmp_path / "bpe.gguf", tmp_path / "cache")
    assert tokenizer.pre_tokenizer is not None
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345 Cab'S!\n\n x")
    decode = decoders.ByteLevel().decode
    assert [decode([word]) for word, _ in cut] == words
    assert tokenizer.decode(tokenizer.encode("ä 1\n").ids) == "ä 1\n"


def test_a_tokeniser_that_is_not_supported_may_lie_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "other" / "wp.gguf"
    path.parent.mkdir()
    write_tokens(path, {"model": "bert"}, ["a", "b"], [TokenType.NORMAL] * 2)
    with pytest.raises(ConfigError, match=r"supported: gpt2, llama, or a tokenizer\.json beside"):
        resolve_model(path, tmp_path / "cache")
    write_tokens(path, {"model": "gpt2", "pre": "viking"}, ["a", "b"], [TokenType.NORMAL] * 2)
    with pytest.raises(ConfigError, match=r"pre 'viking'; supported: llama-bpe, .*, or a tokenizer.json beside"):
        resolve_model(path, tmp_path / "cache")
    (path.parent / "tokenizer.json").write_text("{}")
    (path.parent / "chat_template.jinja").write_text("hello")
    folder = resolve_model(path, tmp_path / "cache")
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / "chat_template.jinja").read_text() == "hello"


def test_a_changed_file_is_described_again(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    as_gguf(make_checkpoint("Qwen2"), path, "Qwen2", {})
    first = resolve_model(path, tmp_path / "cache")
    assert resolve_model(path, tmp_path / "cache") == first
    assert resolve_model(tmp_path, tmp_path / "cache") == first  # a folder with one such file means it
    as_gguf(make_checkpoint("Qwen2", num_hidden_layers=3), path, "Qwen2", {})
    again = resolve_model(path, tmp_path / "cache")
    assert load_config(again).num_layers == 3
