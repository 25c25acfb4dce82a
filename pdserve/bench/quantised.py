"""`python -m pdserve.bench.quantised [TEXT]`: what quantised weights cost in quality, against the dense ones.

Perplexity of both over the tokens of a text file, in windows of 512 of which the second half counts; how often the
likeliest next token is the same; and how many tokens of a greedy answer are the same before the first that is not.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from pdserve.kernels import choose
from pdserve.kernels.base import Batch
from pdserve.launch.folders import cache_folder
from pdserve.models.config import load_config
from pdserve.models.decoder import Decoder
from pdserve.models.default_model import ensure_default_model
from pdserve.models.source import resolve_model
from pdserve.models.weight_format import WEIGHT_FORMATS, WeightFormat
from pdserve.models.weights import open_weights

WINDOW, BLOCK_SIZE, ANSWER = 512, 16, 64


class Alone:
    """One sequence at a time on a decoder, from position 0."""

    def __init__(self, folder: Path, weight_format: WeightFormat) -> None:
        config = load_config(folder)
        weights = open_weights(folder, config, "bfloat16", cache_folder(), weight_format)
        self._decoder = Decoder(config, weights, choose("auto"), 2 * WINDOW)
        shape = (2 * WINDOW // BLOCK_SIZE, config.num_kv_heads, config.num_layers, 2, BLOCK_SIZE, config.head_dim)
        self._pool = torch.zeros(shape, dtype=torch.bfloat16)

    def logits(self, token_ids: list[int], computed: int = 0) -> Tensor:
        """Of all tokens from `computed` on, [tokens, vocab]."""
        batch = Batch(
            positions=torch.arange(computed, len(token_ids), dtype=torch.int32),
            query_start=torch.tensor([0, len(token_ids) - computed], dtype=torch.int32),
            context_len=torch.tensor([len(token_ids)], dtype=torch.int32),
            block_tables=torch.arange(self._pool.shape[0], dtype=torch.int32).unsqueeze(0),
            max_query_len=len(token_ids) - computed,
        )
        hidden = self._decoder.forward(torch.tensor(token_ids[computed:]), batch, self._pool)
        return self._decoder.logits(hidden)

    def answer(self, prompt: list[int]) -> list[int]:
        tokens, computed = list(prompt), 0
        while len(tokens) < len(prompt) + ANSWER:
            logits = self.logits(tokens, computed)
            computed = len(tokens)
            tokens.append(int(logits[-1].argmax()))
        return tokens[len(prompt) :]


def compare(dense: Alone, packed: Alone, tokens: list[int]) -> dict[str, float]:
    models = {"dense": dense, "packed": packed}
    losses, same = dict.fromkeys(models, 0.0), 0
    count = 0
    for start in range(0, len(tokens) - WINDOW, WINDOW // 2):
        window, half = tokens[start : start + WINDOW + 1], WINDOW // 2
        targets = torch.tensor(window[half + 1 :])
        logits = {name: model.logits(window[:-1])[half:] for name, model in models.items()}
        for name, values in logits.items():
            losses[name] += float(cross_entropy(values, targets, reduction="sum"))
        same += int((logits["dense"].argmax(-1) == logits["packed"].argmax(-1)).sum())
        count += len(targets)
    perplexity = {f"perplexity_{name}": round(math.exp(loss / count), 3) for name, loss in losses.items()}
    return {"tokens": count, **perplexity, "same_likeliest_token": round(same / count, 4)}


def agreement(dense: Alone, packed: Alone, tokens: list[int], answers: int) -> float:
    """Mean number of equal tokens at the start of greedy answers, of ANSWER."""
    equal = 0
    for start in range(0, answers * WINDOW // 4, WINDOW // 4):
        prompt = tokens[start : start + WINDOW // 4]
        pairs = list(zip(dense.answer(prompt), packed.answer(prompt), strict=True))
        equal += next((i for i, (a, b) in enumerate(pairs) if a != b), ANSWER)
    return round(equal / answers, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, nargs="?", default=Path("docs/design.md"))
    parser.add_argument("--model", help="default: the default model")
    parser.add_argument("--weights", choices=WEIGHT_FORMATS[1:], default="int4")
    parser.add_argument("--answers", type=int, default=8)
    args = parser.parse_args()
    cache = cache_folder()
    folder = resolve_model(args.model, cache) if args.model else ensure_default_model(cache, lambda text, share: None)
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(args.text.read_text()).ids
    dense, packed = Alone(folder, "dense"), Alone(folder, args.weights)
    result = {"weights": args.weights, **compare(dense, packed, tokens)}
    result[f"equal_tokens_of_{ANSWER}"] = agreement(dense, packed, tokens, args.answers)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
