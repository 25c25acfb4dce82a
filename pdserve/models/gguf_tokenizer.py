"""The tokenizer.json and tokenizer_config.json that the fields of a GGUF file stand for.

Two kinds: byte-level BPE with its merges, where the file only names how text is cut into words first; and SentencePiece
BPE, whose merges follow from the scores of its pieces.
"""

from __future__ import annotations

from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pdserve.errors import ConfigError
from pdserve.models.gguf_file import GgufFile

_SPACE = "▁"  # how SentencePiece writes a space
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD_END_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_GPT4O_LETTERS = _LETTERS.replace("%s", rf"{_CONTRACTION}?")
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_WORD_END}"
# `tokenizer.ggml.pre` to the expression of the words; None cuts off single digits and then does as GPT-2.
WORDS: dict[str, str | None] = {
    "llama-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "qwen2": rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_WORD_END}",
    "tekken": rf"{_LETTERS.replace('%s', '')}|\p{{N}}|{_WORD_END_SLASH}",
    "gpt-4o": rf"{_GPT4O_LETTERS}|\p{{N}}{{1,3}}|{_WORD_END_SLASH}",
    "smollm": None,
    "refact": None,
    "starcoder": None,
}
_GPT2 = ("default", "gpt-2", "olmo")
_IGNORES_MERGES = ("llama-bpe", "tekken")  # a word that is in the vocabulary is that token


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """
    Raises:
        ConfigError: a kind of tokeniser that is not supported.
    """
    kind = file.field("tokenizer.ggml.model")
    tokens = file.field("tokenizer.ggml.tokens") or []
    if kind == "gpt2":
        tokenizer = _byte_level(file, tokens)
    elif kind == "llama":
        tokenizer = _sentence_piece(file, tokens)
    else:
        raise _unsupported(file, f"model {kind!r}", "gpt2, llama")
    kinds = file.field("tokenizer.ggml.token_type") or []
    pairs = list(zip(tokens, kinds, strict=False))
    control = [token for token, kind in pairs if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    own = [token for token, kind in pairs if kind == TokenType.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in own])
    if _adds_bos(file, kind):
        bos = file.field("tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def gguf_tokenizer_config(file: GgufFile) -> dict[str, Any]:
    tokens = file.field("tokenizer.ggml.tokens") or []
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    ids = {name: file.field(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    template = file.field("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file.shape_field("context_length"),
        "clean_up_tokenization_spaces": False,
        **{name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)},
        **({} if template is None else {"chat_template": template}),
    }


def _unsupported(file: GgufFile, what: str, supported: str) -> ConfigError:
    return ConfigError(
        f"{file.path} has a tokeniser of {what}; supported: {supported}, or a tokenizer.json beside the file."
    )


def _adds_bos(file: GgufFile, kind: str) -> bool:
    says = file.field("tokenizer.ggml.add_bos_token")
    if says is None:
        says = kind == "llama" or file.field("tokenizer.ggml.pre") == "llama-bpe"
    return bool(says) and file.field("tokenizer.ggml.bos_token_id") is not None


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    pre = file.field("tokenizer.ggml.pre") or "default"
    if pre not in WORDS and pre not in _GPT2:
        raise _unsupported(file, f"pre {pre!r}", ", ".join((*WORDS, *_GPT2)))
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges") or []]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _IGNORES_MERGES))
    words = WORDS.get(pre)
    steps: list[pre_tokenizers.PreTokenizer] = []
    if words is not None:
        steps.append(pre_tokenizers.Split(Regex(words), behavior="isolated"))
    elif pre not in _GPT2:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentence_piece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    scores: list[float] = file.field("tokenizer.ggml.scores") or []
    unknown = file.field("tokenizer.ggml.unknown_token_id")
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocab,
        merges=_merges(vocab, scores),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    says = file.field("tokenizer.ggml.add_space_prefix")
    prefixed = says is None or bool(says)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the piece with the highest score first, then the longest left part."""
    found = []
    for (piece, _), score in zip(vocab.items(), scores, strict=False):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                found.append((-score, -cut, left, right))
    found.sort(key=lambda entry: entry[:2])
    return [(left, right) for _, _, left, right in found]
