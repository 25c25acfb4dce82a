"""Roles change under load with real workers: every answer is the undisturbed one, and pools are whole."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.conftest import MakeStack
from tests.support.passages import Encode, passage_tokens
from tests.support.stack import Stack, get_json, post_json, wait_for

pytestmark = pytest.mark.e2e

BOUND_S = 30.0
REQUESTS = 10


@pytest.fixture(scope="module")
def three(make_stack: MakeStack) -> Iterator[Stack]:
    """Small chunks, so that a prompt is in each of its phases for a while."""
    with make_stack("--max-batched-tokens", "128", prefill=2, decode=1) as stack:
        yield stack


def flip(stack: Stack, worker: str, role: str, drain_s: float) -> None:
    """Returns when the worker has the role."""
    found = post_json(f"{stack.url}/admin/workers/{worker}/role", {"role": role, "drain_s": drain_s, "force": True})
    assert role in (found["role"], found["next_role"])

    def changed() -> bool:
        workers = get_json(f"{stack.url}/v1/topology")["workers"]
        return any((w["worker_id"], w["role"], w["next_role"]) == (worker, role, None) for w in workers)

    wait_for(changed, BOUND_S, lambda: f"{worker} does not become {role}")


def test_answers_are_the_same_while_roles_change(three: Stack, mixed: Stack, encode: Encode) -> None:
    bodies: list[dict[str, Any]] = [
        {
            "prompt": passage_tokens(encode, 700 + n, 40 + 45 * (n % 5)),
            "max_tokens": 20,
            "temperature": 0.8 if n % 2 else 0.0,
            "seed": n,
            "ignore_eos": True,
        }
        for n in range(REQUESTS)
    ]
    with ThreadPoolExecutor(4) as executor:
        expected = list(executor.map(lambda body: mixed.client.ask(body).text, bodies))
        answers = [executor.submit(lambda body: three.client.ask(body).text, body) for body in bodies]
        # Both ends of a pair, the last of a role included; the second one does not wait for what runs.
        flip(three, "prefill-1", "decode", BOUND_S)
        flip(three, "decode-0", "prefill", 0.0)
        flip(three, "prefill-0", "mixed", 0.0)
        flip(three, "prefill-1", "prefill", 0.0)
        flip(three, "decode-0", "decode", BOUND_S)
        flip(three, "prefill-0", "prefill", 0.0)
        assert [answer.result() for answer in answers] == expected
    # Links work in the roles of the beginning again.
    wait_for(lambda: _linked(three), BOUND_S, lambda: "not linked again")
    handed = three.workers["decode-0"].metric("pdserve_transfer_seconds_count")
    assert [three.client.ask(body).text for body in bodies[:2]] == expected[:2]
    assert three.workers["decode-0"].metric("pdserve_transfer_seconds_count") > handed
    three.assert_pools_whole()


def _linked(stack: Stack) -> bool:
    pairs = get_json(f"{stack.url}/v1/topology")["pairs"]
    return len(pairs) == 2 and all(pair["up"] for pair in pairs)
