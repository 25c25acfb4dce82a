"""Greedy answers are token for token those of transformers in float32, in every deployment, alone and 16 at once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.api_client import Answer
from tests.support.passages import Encode, passage, passage_tokens
from tests.support.stack import Stack

# Minutes of two cores, all of them in the test that is the first to wait.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

BLOCK_SIZE = 16
OUTPUT_TOKENS = BLOCK_SIZE  # so that every answer goes on from one block into the next
# One and two tokens; then one below, at and above the ends of blocks, of the chunks of `disaggregated` (128 tokens) and
# of those of `mixed` (512).
LENGTHS = (1, 2, *(n + d for n in (16, 32, 48, 64, 80, 96, 128, 512) for d in (-1, 0, 1)), 1024, 2000, 3000)
TEXTS = (
    "Der schnelle Zug nach Köln fährt um",
    "Le cœur a ses raisons que la raison ne connaît",
    "«Он сказал: здравствуйте»",
    "東京は日本の首都です。京都は",
    "서울은 대한민국의",
    "مرحبا بالعالم، هذا اختبار",
    "שלום עולם",
    "नमस्ते दुनिया",
    "🦊🐻🦁 → 🐼🐨",
    "family: 👨‍👩‍👧‍👦, flag: 🇵🇹, thumbs: 👍🏽",
    "e\u0301 is é and A\u030a is Å; ∑ᵢ xᵢ² ≤ ∫₀¹ f(x) dx",
    "   \n\n\t  ",
    "\u0000\u0007 control \u200b zero\u00a0width",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "#include <stdio.h>\n\nint main(void) {\n\tprintf(",
    '{"name": "Ada", "languages": ["en", "fr"], "address": {"city":',
    "SELECT customer, SUM(total) FROM orders WHERE year = 2020 GROUP BY",
    "<html>\n  <body>\n    <h1>Rivers</h1>\n    <ul>\n      <li>",
)
CONVERSATION = (
    ("user", "Name three rivers."),
    ("assistant", "The Nile, the Amazon and the Rhine."),
    ("user", "Which of them is the longest?"),
    ("assistant", "The Nile, by most measures."),
    ("user", "And where does it end? Answer in one sentence. 🌊"),
)


@dataclass(frozen=True)
class Case:
    name: str
    body: dict[str, Any]
    token_ids: list[int]  # of the prompt, as transformers has it


@dataclass(frozen=True)
class Reference:
    token_ids: list[int]
    text: str


@pytest.fixture(scope="module")
def cases(default_model: Path, encode: Encode) -> list[Case]:
    tokenizer: Any = AutoTokenizer.from_pretrained(default_model)
    ids = [(f"{n} tokens", passage_tokens(encode, n, n)) for n in LENGTHS]
    shared = passage_tokens(encode, 7, 200)
    # Prefixes that end inside a block, at its end, and one token behind it.
    ids += [(f"{n} shared tokens", shared[:n] + passage_tokens(encode, 100 + n, 30)) for n in (100, 191, 192, 193, 200)]
    texts = [*TEXTS, passage(8, 20)]
    chats = [[{"role": role, "content": text} for role, text in CONVERSATION[:n]] for n in (1, 3, 5)]
    chats += [[{"role": "system", "content": "You answer like a pirate."}, *chat] for chat in chats]
    chats.append([{"role": "user", "content": passage(9, 40) + "\n\nSummarise this."}])
    found = [Case(name, {"prompt": token_ids}, token_ids) for name, token_ids in ids]
    found += [Case(repr(text[:20]), {"prompt": text}, tokenizer(text)["input_ids"]) for text in texts]
    for n, chat in enumerate(chats):
        token_ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        found.append(Case(f"chat {n}", {"messages": chat}, token_ids))
    random.Random(0).shuffle(found)  # long and short ones beside each other
    return found


@dataclass(frozen=True)
class Asked:
    """Answers to all cases, in their order: to prompts that the workers see for the first time, and once more."""

    first: Future[list[Answer]]
    again: Future[list[Answer]]


@pytest.fixture(scope="module")
def asked(disaggregated: Stack, mixed: Stack, cases: list[Case]) -> Iterator[dict[str, Asked]]:
    """Both deployments are asked at the same time, since neither keeps more than a core busy."""
    with ThreadPoolExecutor(4) as executor:

        def ask_twice(stack: Stack, at_once_first: int, at_once_again: int) -> Asked:
            first = executor.submit(ask_all, stack, cases, at_once_first)
            return Asked(first, executor.submit(lambda: first.result() and ask_all(stack, cases, at_once_again)))

        yield {"disaggregated": ask_twice(disaggregated, 1, 16), "mixed": ask_twice(mixed, 16, 1)}


@pytest.fixture(scope="module")
def reference(default_model: Path, cases: list[Case], asked: dict[str, Asked]) -> Iterator[Future[list[Reference]]]:
    with ThreadPoolExecutor(1) as executor:
        yield executor.submit(transformers_answers, default_model, cases, asked["mixed"].first)


def transformers_answers(folder: Path, cases: Sequence[Case], drafts: Future[list[Answer]]) -> list[Reference]:
    """What transformers generates, whatever the drafts are: a good one only saves it most of the steps."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for case, draft in zip(cases, drafts.result(), strict=True):
        token_ids = greedy(model, case.token_ids, tokenizer(draft.text)["input_ids"])
        found.append(Reference(token_ids, tokenizer.decode(token_ids, skip_special_tokens=True)))
    return found


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], draft: list[int]) -> list[int]:
    """Greedy decoding that checks `draft`, which has no stop token, in one pass, and goes on where it errs or ends."""
    inputs = torch.tensor([prompt + draft])
    output = model(inputs, use_cache=True, logits_to_keep=len(draft) + 1)
    likeliest = output.logits[0].argmax(-1).tolist()  # after the prompt, and after each token of the draft
    kept = next((n for n, token_id in enumerate(draft) if likeliest[n] != token_id), len(draft))
    if kept < len(draft):
        output.past_key_values.crop(kept - len(draft))
    token_ids = [*draft[:kept], likeliest[kept]]
    while len(token_ids) < OUTPUT_TOKENS and token_ids[-1] != model.config.eos_token_id:
        step = model(torch.tensor([token_ids[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        token_ids.append(int(step.logits[0, -1].argmax()))
    return token_ids[:OUTPUT_TOKENS]


def ask_all(stack: Stack, cases: Sequence[Case], at_once: int) -> list[Answer]:
    bodies = [{**case.body, "max_tokens": OUTPUT_TOKENS} for case in cases]
    with ThreadPoolExecutor(at_once) as executor:
        return list(executor.map(stack.client.ask, bodies))


def assert_equal(cases: Sequence[Case], answers: Sequence[Answer], references: Sequence[Reference]) -> None:
    different = {
        case.name: (answer.text, reference.text)
        for case, answer, reference in zip(cases, answers, references, strict=True)
        if (answer.text, answer.output_tokens) != (reference.text, len(reference.token_ids))
    }
    assert not different
    assert [answer.usage["prompt_tokens"] for answer in answers] == [len(case.token_ids) for case in cases]


def assert_cached(cases: Sequence[Case], answers: Sequence[Answer]) -> None:
    """Of a prompt that was seen before, all full blocks, but never the last token: it is computed for its logits."""
    expected = [(len(case.token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE for case in cases]
    assert [answer.cached_tokens for answer in answers] == expected


def test_sixty_prompts(cases: list[Case]) -> None:
    assert len(cases) == len({tuple(case.token_ids) for case in cases}) == 60
    assert max(len(case.token_ids) for case in cases) == 3000


@pytest.mark.parametrize("name", ["disaggregated", "mixed"])
def test_answers(name: str, cases: list[Case], asked: dict[str, Asked], reference: Future[list[Reference]]) -> None:
    assert_equal(cases, asked[name].first.result(), reference.result())
    assert_equal(cases, asked[name].again.result(), reference.result())
    assert_cached(cases, asked[name].again.result())


def test_prompts_were_handed_over_and_pools_are_whole(
    disaggregated: Stack, mixed: Stack, cases: list[Case], asked: dict[str, Asked]
) -> None:
    assert asked["disaggregated"].again.result()
    assert disaggregated.workers["decode-0"].metric("pdserve_transfer_seconds_count") >= len(cases)
    disaggregated.assert_pools_whole()
    mixed.assert_pools_whole()
