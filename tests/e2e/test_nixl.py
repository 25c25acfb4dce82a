"""Workers that move blocks by NIXL: answers are those of one worker, and a decode worker that dies costs nobody one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from tests.e2e.conftest import MakeStack
from tests.support.at_once import at_once
from tests.support.passages import Encode, passage_tokens
from tests.support.stack import Stack, WorkerProcess, wait_for
from tests.support.transports import NIXL

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def by_nixl(make_stack: MakeStack) -> Iterator[Stack]:
    if not NIXL.exists() and os.environ.get("CI") != "true":
        pytest.skip("NIXL is not there: make nixl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(NIXL)))))
        with make_stack("--transport", "nixl", "--max-batched-tokens", "256", fresh=True, prefill=1, decode=2) as stack:
            yield stack


def body(encode: Encode, salt: int, length: int = 700, max_tokens: int = 24) -> dict[str, Any]:
    return {"prompt": passage_tokens(encode, salt, length), "max_tokens": max_tokens, "temperature": 0}


def ask_all(stack: Stack, bodies: list[dict[str, Any]]) -> list[str]:
    """At once."""
    return [answer.text for answer in at_once(*(partial(stack.client.ask, each) for each in bodies))]


def busy(worker: WorkerProcess) -> bool:
    return worker.blocks("receiving") + worker.blocks("held") > 0


def test_answers_are_those_of_one_worker(by_nixl: Stack, mixed: Stack, encode: Encode) -> None:
    bodies = [body(encode, salt, length) for salt, length in enumerate((1, 16, 17, 250, 700, 1500), 900)]
    answers, expected = at_once(*(partial(ask_all, stack, bodies) for stack in (by_nixl, mixed)))
    assert answers == expected
    received = [w.metric("pdserve_transfer_bytes_total", direction="received") for w in by_nixl.with_role("decode")]
    assert sum(received) > 0
    by_nixl.assert_pools_whole()


def test_a_decode_worker_that_is_killed_costs_no_request(by_nixl: Stack, mixed: Stack, encode: Encode) -> None:
    bodies = [body(encode, salt, max_tokens=40) for salt in range(950, 954)]
    victim = by_nixl.with_role("decode")[0]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [pool.submit(by_nixl.client.ask, each) for each in bodies]
        wait_for(lambda: busy(victim), 60, lambda: f"no request reached the victim: {victim.ledger()}")
        victim.kill()
        texts = [answer.result(60).text for answer in answers]
    assert texts == ask_all(mixed, bodies)
    by_nixl.assert_pools_whole()
