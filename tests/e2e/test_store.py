"""What was computed once, anywhere, is not computed again: after a turn, a restart, a death, on another machine."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import MakeStack
from tests.kvstore.store.redis_process import RedisProcess, start_redis
from tests.support.api_client import Answer, ApiClient
from tests.support.at_once import at_once
from tests.support.passages import Encode, passage
from tests.support.stack import Stack, get_json, metric, wait_for

pytestmark = pytest.mark.e2e

BLOCK_SIZE = 16
HOST = ("--host-bytes", "400MiB")  # a block of the default model in float32 has 720 KiB


@pytest.fixture(scope="module")
def pair(make_stack: MakeStack) -> Iterator[Stack]:
    with make_stack("--max-batched-tokens", "256", store=HOST, prefill=1, decode=2) as stack:
        yield stack


def asking(stack: Stack) -> ApiClient:
    return ApiClient(stack.port, stack.model.name, headers={"x-pdserve-timeline": "1"})


def known_of_stores(stack: Stack) -> float:
    return metric(f"{stack.url}/metrics", "pdserve_router_store_index_keys")


def await_blocks(stack: Stack, tier: str, count: int) -> None:
    def there() -> bool:
        assert stack.store is not None
        return stack.store.metric("pdserve_store_blocks", tier=tier) >= count

    wait_for(there, 20.0, lambda: f"fewer than {count} blocks in the {tier} tier:\n{stack.log('store')}")


def full_blocks(answer: Answer) -> int:
    """Of all tokens but the last, whose KV nobody computes."""
    return (answer.usage["total_tokens"] - 1) // BLOCK_SIZE


def test_next_turn_computes_its_own_words_only(pair: Stack, mixed: Stack, encode: Encode) -> None:
    """After a restart of all workers, so that nothing is left but the store."""
    first_turn = passage(1, 60)
    first = asking(pair).complete(first_turn, max_tokens=40)
    second_turn = f"{first_turn}{first.text} {passage(2, 3)}"
    known = [*encode(first_turn), *encode(first.text)][: first.usage["total_tokens"] - 1]
    assert encode(second_turn)[: len(known)] == known, "this test needs text that is tokenised alike in both turns"
    await_blocks(pair, "host", full_blocks(first))
    pair.end_workers()
    pair.revive()
    wait_for(lambda: known_of_stores(pair) >= full_blocks(first), 20.0, lambda: "the router does not follow the store")
    second = asking(pair).complete(second_turn)
    assert second.cached_by_tier == {"host": full_blocks(first) * BLOCK_SIZE}
    # No worker held anything: the decision says from where the prefix comes, and how long that takes.
    [record] = get_json(f"{pair.url}/v1/requests?limit=1")["data"]
    decision = record["decisions"][0]
    assert (decision["best_hit_blocks"], decision["fetched_blocks"]) == (0, full_blocks(first))
    assert decision["reachable_blocks"] == full_blocks(first)
    chosen = next(each for each in decision["candidates"] if each["worker_id"] == decision["chosen"])
    assert chosen["fetch"] == {
        "blocks": full_blocks(first),
        "tier": "host",
        "seconds": chosen["terms_s"]["fetch"],
    }
    assert second.text == mixed.client.complete(second_turn).text
    pair.assert_pools_whole()


def test_next_chat_turn_computes_its_own_words_and_the_template_only(pair: Stack, mixed: Stack, encode: Encode) -> None:
    """The prompt is in prefill's pool still; the answer, which decode has computed, comes from the store."""
    messages = [{"role": "user", "content": passage(20, 40)}]
    first = asking(pair).chat(messages, max_tokens=40)
    assert len(encode(first.text)) == first.output_tokens, "this test needs text that is tokenised alike in both turns"
    await_blocks(pair, "host", full_blocks(first))
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": passage(21, 5)}]
    second = asking(pair).chat(messages)
    new = second.usage["prompt_tokens"] - first.usage["total_tokens"]
    assert second.usage["prompt_tokens"] - second.cached_tokens <= new + BLOCK_SIZE
    assert second.cached_by_tier["host"] > 0
    assert second.text == mixed.client.chat(messages).text
    pair.assert_pools_whole()


def test_death_of_decode_costs_the_tail_only(pair: Stack, mixed: Stack) -> None:
    body: dict[str, Any] = {"prompt": passage(3, 100), "max_tokens": 60, "seed": 5, "temperature": 0.8}
    expected = mixed.client.ask(body).text
    with asking(pair).stream(body) as stream:
        stream.read(35)
        holder = pair.holder(stream.request_id, "decode")
        before = sum(worker.metric("pdserve_computed_tokens_total") for worker in pair.with_role("prefill"))
        holder.kill()
        assert stream.finish().text == expected
    after = sum(worker.metric("pdserve_computed_tokens_total") for worker in pair.with_role("prefill"))
    # What decode had not saved yet, at most the step in hand and a partial block, and one step of writing behind.
    assert after - before <= 4 * BLOCK_SIZE
    pair.revive()
    pair.assert_pools_whole()


def test_answers_go_on_when_the_store_is_killed_or_frozen(pair: Stack, mixed: Stack) -> None:
    assert pair.store is not None
    prompts = [passage(seed, 40) for seed in range(10, 16)]
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(pair.client.complete, prompt) for prompt in prompts[:3]]
        pair.store.process.send_signal(signal.SIGSTOP)
        answers += [pool.submit(pair.client.complete, prompt) for prompt in prompts[3:]]
        texts = [answer.result().text for answer in answers]
    pair.store.process.send_signal(signal.SIGCONT)
    pair.end_store(signal.SIGKILL)
    texts.append(pair.client.complete(passage(16, 40)).text)
    pair.start_store()
    expected = at_once(*(partial(mixed.client.complete, prompt) for prompt in [*prompts, passage(16, 40)]))
    assert texts == [answer.text for answer in expected]
    pair.assert_pools_whole()


def test_restart_of_everything_keeps_what_is_on_disk(
    make_stack: MakeStack, mixed: Stack, tmp_path_factory: pytest.TempPathFactory
) -> None:
    disk = ("--disk-bytes", "1GiB", "--disk-path", str(tmp_path_factory.mktemp("disk")))
    with make_stack(store=(*HOST, *disk), mixed=1) as stack:
        prompt = passage(4, 60)
        first = asking(stack).complete(prompt)
        await_blocks(stack, "host", full_blocks(first))
        stack.end_workers()
        stack.end_store()
        stack.start_store()
        stack.revive()
        again = asking(stack).complete(prompt)
        assert again.cached_by_tier == {"disk": (again.usage["prompt_tokens"] - 1) // BLOCK_SIZE * BLOCK_SIZE}
        assert again.text == first.text == mixed.client.complete(prompt).text


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    server = start_redis(tmp_path)
    yield server
    server.kill()


def test_second_machine_finds_what_only_the_first_has_seen(make_stack: MakeStack, redis: RedisProcess) -> None:
    def node(name: str, host: str) -> tuple[str, ...]:
        return (*HOST, "--node-id", name, "--host", host, "--redis", redis.url)

    with (
        make_stack(store=node("a", "127.0.0.1"), mixed=1) as here,
        make_stack(store=node("b", "127.0.0.2"), fresh=True, mixed=1) as there,
    ):
        prompt = passage(5, 60)
        first = asking(here).complete(prompt)
        await_blocks(here, "host", full_blocks(first))
        reusable = (first.usage["prompt_tokens"] - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert asking(there).complete(passage(6, 5)).text  # the other machine's own traffic opens its store
        again = asking(there).complete(prompt)
        assert again.cached_by_tier == {"remote": reusable}
        assert again.text == first.text


def test_prompt_waits_in_the_store_while_decode_has_no_room(make_stack: MakeStack, mixed: Stack) -> None:
    """Decode holds 1,024 tokens: the second long request spills, and goes on where the first has ended."""
    decode_room = ("--kv-bytes", str(64 * 720 * 1024), "--max-model-len", "1000")
    with make_stack(*decode_room, store=HOST, prefill=1, decode=1) as stack:
        prompts = [passage(seed, 45) for seed in (7, 8)]
        clients = [client for client in (asking(stack), mixed.client) for _ in prompts]
        calls = zip(clients, prompts * 2, strict=True)
        answers = at_once(*(partial(client.complete, prompt, max_tokens=200) for client, prompt in calls))
        assert [answer.text for answer in answers[:2]] == [answer.text for answer in answers[2:]]
        assert stack.events("spills") >= 1
        stack.assert_pools_whole()
