"""Real processes with the real model, in float32, where the order of a sum does not change an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers

from tests.support.passages import Encode
from tests.support.stack import Stack
from tests.support.tool_model import taught

MakeStack = Callable[..., Stack]


@pytest.fixture(scope="session")
def make_stack(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeStack:
    """Makes a stack, to be entered: further keywords are numbers of workers by role, options the workers'."""

    def make(
        *options: str,
        store: tuple[str, ...] | None = None,
        router: tuple[str, ...] = (),
        fresh: bool = False,
        **roles: int,
    ) -> Stack:
        worker_options = ("--dtype", "float32", *options)
        folder = tmp_path_factory.mktemp("stack")
        return Stack(default_model, folder, roles, worker_options, store, router, fresh=fresh)

    return make


@pytest.fixture(scope="session")
def disaggregated(make_stack: MakeStack) -> Iterator[Stack]:
    """One prefill and one decode worker, for tests that leave both as they were. Small chunks, so that a prompt is
    pushed while it is computed and a step is over soon."""
    with make_stack("--max-batched-tokens", "128", prefill=1, decode=1) as stack:
        yield stack


@pytest.fixture(scope="session")
def mixed(make_stack: MakeStack) -> Iterator[Stack]:
    """One mixed worker: what it answers is what every other deployment has to answer."""
    with make_stack(mixed=1) as stack:
        yield stack


@pytest.fixture(scope="session")
def model_with_tools(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught(default_model, tmp_path_factory.mktemp("model") / "with-tools")


@pytest.fixture(scope="session")
def with_tools(model_with_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One prefill and two decode workers of a model that was taught to call tools."""
    roles = {"prefill": 1, "decode": 2}
    with Stack(model_with_tools, tmp_path_factory.mktemp("stack"), roles, ("--dtype", "float32")) as stack:
        yield stack


@pytest.fixture(scope="session")
def mixed_with_tools(model_with_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(model_with_tools, tmp_path_factory.mktemp("stack"), {"mixed": 1}, ("--dtype", "float32")) as stack:
        yield stack


@pytest.fixture(scope="session")
def encode(default_model: Path) -> Encode:
    tokenizer = tokenizers.Tokenizer.from_file(str(default_model / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
