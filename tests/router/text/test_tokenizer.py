"""Encoding recognises special tokens, decoding leaves them out, and each token's bytes add up to the decoded text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, processors

from pdserve.errors import ConfigError
from router.text.tokenizer import Tokenizer


def test_text_survives_the_round_trip(byte_level: Tokenizer) -> None:
    text = "hello wörld\n\t🙂 \x00"
    assert byte_level.decode(byte_level.encode(text, add_special=True)) == text


def test_written_out_special_tokens_become_tokens(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("<|im_start|>hell", add_special=False)
    assert len(ids) == 2
    assert byte_level.token_bytes[ids[0]] == b""
    assert byte_level.decode(ids) == "hell"


def test_beginning_token_is_added_on_request_only() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="a"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("a", add_special=True) == [0, 1]
    assert tokenizer.encode("a", add_special=False) == [1]


def test_truncation_and_padding_of_the_file_are_ignored(byte_level: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level._backend.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    assert len(Tokenizer(backend).encode("a" * 10, add_special=True)) == 10


def test_token_bytes_cover_every_id(byte_level: Tokenizer) -> None:
    assert byte_level.vocab_size == len(byte_level.token_bytes) == 256 + 3 + 2 + 2
    assert byte_level.token_bytes[258] == b"hell"
    assert "中文 token".encode() in byte_level.token_bytes
    assert b"no space" in byte_level.token_bytes


def test_byte_fallback_tokens_are_their_bytes(byte_fallback: Tokenizer) -> None:
    table = byte_fallback.token_bytes
    assert table[:3] == (b"", b"", b"")
    assert table[3:259] == tuple(bytes([n]) for n in range(256))
    assert table[259:] == (b" ", b" hello", b" wor", b"ld", "é".encode())


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Metaspace()])
def test_unsupported_decoder_is_named(decoder: decoders.Decoder | None) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(ConfigError, match="is not supported"):
        Tokenizer(backend)


def test_missing_and_damaged_files_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_default_model_round_trip(default_model: Path) -> None:
    tokenizer = Tokenizer.from_folder(default_model)
    text = "The quick brown fox — 12345 — прыгает 🦊\n\n\tdef f(x):\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special=True)) == text
    assert tokenizer.vocab_size == 49152
