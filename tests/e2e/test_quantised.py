"""Quantised weights through the whole system: one answer from disaggregated and from mixed workers.

The default model in 8 and in 4 bits, and as its GGUF file has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pdserve.errors import ConfigError
from pdserve.models import default_model as fetching
from pdserve.models.source import resolve_model
from tests.e2e.test_conformance import SCHEMA, ask, assert_same, in_short, streamed
from tests.support.at_once import at_once
from tests.support.passages import passage
from tests.support.stack import Stack

pytestmark = pytest.mark.e2e

PROMPT = passage(910, 12)
JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
USER = [{"role": "user", "content": "Name three fruits."}]
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("/v1/completions", {"prompt": PROMPT, "temperature": 0, "max_tokens": 24, "logprobs": 5}),
    "drawn": ("/v1/completions", {"prompt": PROMPT, "temperature": 1, "seed": 7, "n": 3, "logprobs": 0}),
    "echo": ("/v1/completions", {"prompt": PROMPT, "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 1}),
    "grammar": (
        "/v1/chat/completions",
        {"messages": USER, "response_format": JSON, "logprobs": True, "top_logprobs": 3, "temperature": 1, "seed": 3},
    ),
}


@pytest.fixture(scope="module")
def gguf_model(model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that describes the default model's own file."""
    folder = tmp_path_factory.mktemp("gguf")
    try:
        path = fetching._extract(fetching._download(folder, lambda description, fraction: None), folder)
    except ConfigError as error:
        pytest.skip(str(error))
    return resolve_model(path, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", params=["int8", "int4", "gguf"])
def stacks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Stack]]:
    """Disaggregated, with chunks and blocks that are pushed while later ones are computed; and mixed."""
    weights: str = request.param
    model: Path = request.getfixturevalue("gguf_model" if weights == "gguf" else "default_model")
    options = ("--dtype", "float32", "--weights", weights)
    chunked = (*options, "--max-batched-tokens", "64")
    apart = Stack(model, tmp_path_factory.mktemp("stack"), {"prefill": 1, "decode": 1}, chunked)
    with apart, Stack(model, tmp_path_factory.mktemp("stack"), {"mixed": 1}, options) as mixed:
        yield apart, mixed


def test_same_answer_disaggregated_and_mixed(stacks: tuple[Stack, Stack]) -> None:
    apart, mixed = stacks
    for path, body in BODIES.values():
        whole, other = at_once(*(partial(ask, stack, path, body) for stack in (mixed, apart)))
        assert_same(other, whole)
        assert_same(streamed(apart, path, body), in_short(whole))
    assert apart.with_role("decode")[0].metric("pdserve_transfer_bytes_total", direction="received") > 0
    apart.assert_pools_whole()
