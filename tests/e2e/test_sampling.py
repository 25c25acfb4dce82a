"""A seeded answer depends on prompt, parameters and seed only: not on the deployment, nor on the rest of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from tests.e2e.conftest import MakeStack
from tests.support.api_client import Answer
from tests.support.at_once import at_once
from tests.support.passages import passage
from tests.support.stack import Stack

pytestmark = pytest.mark.e2e

PARAMETERS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7},
    {"temperature": 1.0},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.95},
    {"temperature": 0.2, "top_p": 0.99},
    {"temperature": 2.0, "top_k": 2},
)
# 16 requests of different lengths, with all parameters twice.
BODIES: tuple[dict[str, Any], ...] = tuple(
    {"prompt": passage(200 + n, 1 + 5 * n), "seed": 1000 + n, "max_tokens": 16, **PARAMETERS[n % len(PARAMETERS)]}
    for n in range(16)
)


def ask_all(stack: Stack, bodies: Sequence[dict[str, Any]], at_once: int) -> list[Answer]:
    with ThreadPoolExecutor(at_once) as executor:
        return list(executor.map(stack.client.ask, bodies))


def texts(answers: Sequence[Answer]) -> list[tuple[str, int]]:
    return [(answer.text, answer.output_tokens) for answer in answers]


def test_same_text_everywhere_alone_and_in_a_batch(disaggregated: Stack, mixed: Stack) -> None:
    stacks = (disaggregated, mixed)
    with ThreadPoolExecutor() as executor:
        alone = [texts(answers) for answers in executor.map(lambda stack: ask_all(stack, BODIES, 1), stacks)]
        batch = [texts(answers) for answers in executor.map(lambda stack: ask_all(stack, BODIES, 16), stacks)]
    assert alone[0] == alone[1]
    assert batch == alone


def test_the_seed_decides(mixed: Stack) -> None:
    """The same request 8 times in one batch, with seeds 0 to 3 twice."""
    bodies = [{"prompt": passage(300, 2), "temperature": 1.0, "seed": n % 4} for n in range(8)]
    found = texts(ask_all(mixed, bodies, 8))
    assert found[:4] == found[4:]
    assert len(set(found)) == 4


def test_almost_no_choice_is_greedy(disaggregated: Stack) -> None:
    prompt = passage(301, 3)
    complete = partial(disaggregated.client.complete, prompt)
    greedy, one_candidate, no_mass = at_once(
        complete,
        partial(complete, temperature=2.0, top_k=1, seed=5),
        partial(complete, temperature=1.0, top_p=0.0, seed=6),
    )
    assert greedy.text == one_candidate.text == no_mass.text


def test_drafts_change_no_token(make_stack: MakeStack, mixed: Stack) -> None:
    """Prompt look-up on a text that repeats itself: the same answers, in fewer steps than tokens."""
    story = "The red fox ran over the hill. The red fox ran over the hill. The red fox ran"
    bodies: list[dict[str, Any]] = [
        {"prompt": story, "max_tokens": 40, **parameters} for parameters in ({"temperature": 0}, *PARAMETERS)
    ]
    for seed, body in enumerate(bodies):
        body["seed"] = seed
    with make_stack("--speculate-tokens", "6", mixed=1) as stack:
        drafting, plain = at_once(*(partial(ask_all, each, bodies, 4) for each in (stack, mixed)))
        assert texts(drafting) == texts(plain)
        worker = stack.workers["mixed-0"]
        drafted = worker.metric("pdserve_drafted_tokens_total")
        accepted = worker.metric("pdserve_accepted_draft_tokens_total")
        assert 20 <= accepted <= drafted
