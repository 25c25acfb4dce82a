"""A guarded deployment: TLS between its processes, tenants by API key. Whoever has no key is let in nowhere, and no
tier gives one tenant what another has computed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import trustme

from pdserve.tenants import add_key
from tests.e2e.conftest import MakeStack
from tests.support.api_client import ApiClient
from tests.support.certificates import write_certificates
from tests.support.passages import passage
from tests.support.stack import Stack, wait_for

pytestmark = pytest.mark.e2e

ADMIN = "admin-secret"
BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tenants")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:
    return {name: add_key(folder / "tenants.toml", name) for name in ("acme", "beta")}


@pytest.fixture(scope="module")
def stack(make_stack: MakeStack, folder: Path, keys: dict[str, str]) -> Iterator[Stack]:
    (folder / "admin").write_text(ADMIN)
    tls = ("--tls-dir", str(write_certificates(folder / "tls", trustme.CA())))
    options = ("--tenants-file", str(folder / "tenants.toml"), "--admin-key-file", str(folder / "admin"))
    made = make_stack(*tls, store=("--host-bytes", "300MiB", *tls), router=(*options, *tls), prefill=1, decode=1)
    made.admin_key = ADMIN
    with made as stack:
        yield stack


def asking(stack: Stack, key: str) -> ApiClient:
    headers = {"authorization": f"Bearer {key}", "x-pdserve-timeline": "1"}
    return ApiClient(stack.port, stack.model.name, headers=headers)


def test_only_a_key_opens_the_door(stack: Stack, keys: dict[str, str]) -> None:
    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0)

    for key in ("unused", keys["acme"][:-1] + "_"):
        with pytest.raises(openai.AuthenticationError):
            client(key).completions.create(model=stack.model.name, prompt="Hello", max_tokens=1)
    answer = client(keys["acme"]).completions.create(model=stack.model.name, prompt="Hello", max_tokens=1)
    assert answer.choices[0].finish_reason == "length"


def test_what_a_tenant_computed_is_found_by_it_alone(stack: Stack, keys: dict[str, str], mixed: Stack) -> None:
    """In the workers' own pools, and after their restart in the store."""
    acme, beta = (asking(stack, keys[name]) for name in ("acme", "beta"))
    prompt, second = passage(1, 40), passage(2, 40)
    first = acme.complete(prompt)
    cached = (first.usage["prompt_tokens"] - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert first.cached_by_tier == {}
    acme.complete(second)
    assert acme.complete(prompt).cached_by_tier == {"device": cached}
    assert acme.ask({"prompt": prompt, "cache_salt": "mine"}).cached_by_tier == {}
    theirs = beta.complete(prompt)
    assert theirs.cached_by_tier == {}
    assert theirs.text == first.text == mixed.client.complete(prompt).text

    wait_for(lambda: held_by(stack) == {"acme", "beta"}, 20.0, lambda: f"in the store: {held_by(stack)}")
    stored = 4 * (cached // BLOCK_SIZE)  # acme's two prompts, one of them under a salt too, and beta's
    assert stack.store is not None
    store = stack.store
    wait_for(lambda: store.metric("pdserve_store_blocks", tier="host") >= stored, 20.0, lambda: "not all is stored")
    stack.end_workers()
    stack.revive()
    assert beta.complete(second).cached_by_tier == {}
    assert acme.complete(prompt).cached_by_tier == {"host": cached}
    assert beta.complete(prompt).cached_by_tier == {"host": cached}
    stack.assert_pools_whole()


def test_records_are_read_by_their_tenant(stack: Stack, keys: dict[str, str]) -> None:
    acme, beta = (openai.OpenAI(base_url=f"{stack.url}/v1", api_key=keys[name]) for name in ("acme", "beta"))
    answer = acme.completions.create(model=stack.model.name, prompt="Hello again", max_tokens=2)
    assert acme.get(f"/requests/{answer.id}/explain", cast_to=object)["tenant"] == "acme"  # type: ignore[index]
    with pytest.raises(openai.NotFoundError):
        beta.get(f"/requests/{answer.id}/explain", cast_to=object)
    with pytest.raises(openai.PermissionDeniedError):
        beta.get("/slo", cast_to=object)


def held_by(stack: Stack) -> set[str]:
    """The tenants of what the store holds, as its operators see them."""
    command = ["kv", "ls", "--json", "--socket", str(stack.log_dir / "store.sock"), "--limit", "1000"]
    listed = subprocess.run([sys.executable, "-m", "pdserve.cli", *command], capture_output=True, check=True)
    return {block["tenant"] for block in json.loads(listed.stdout)}
