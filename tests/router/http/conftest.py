"""The front with a dispatcher that follows a script, a byte-level tokeniser, and a client that drives bare ASGI."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
import tokenizers
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Message
from tokenizers import decoders, models, pre_tokenizers

from kvstore.keys import BlockKey, root_key
from pdserve.errors import InvalidRequest, Overloaded
from pdserve.request import FinishReason, Grammar, Request, TokenLogprobs
from pdserve.timeline import Timeline
from router.generation import Tokens
from router.http.app import make_app
from router.http.service import ServedModel, Service
from router.metrics import RouterMetrics
from router.text.chat_template import ChatTemplate
from router.text.tokenizer import Tokenizer
from router.wishes import NO_WISHES, Wishes

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A step of a script: tokens to deliver, an error to raise, or None to wait until aborted.
Step = Tokens | Exception | None


class FakeGeneration:
    def __init__(self, request: Request, timeline: Timeline, script: Iterable[Step]) -> None:
        self.request = request
        self.timeline = timeline
        self.cached_by_tier = {"device": 2, "disk": 1}
        self.aborted = asyncio.Event()
        self.finished = False
        self.ended = threading.Event()  # aborted or run to its end; may be awaited from another thread
        self._script = list(script)
        timeline.reported["transfer"] = 0.25  # as of a request that was handed over
        self._clock = itertools.count(timeline.received_s + 1)

    async def __aiter__(self) -> AsyncIterator[Tokens]:
        for step in self._script:
            if step is None:
                await self.aborted.wait()
            if self.aborted.is_set():
                yield Tokens((), FinishReason.ABORT)
                return
            if isinstance(step, Exception):
                raise step
            assert step is not None
            for _ in step.token_ids:
                self.timeline.token(next(self._clock))
            yield self._with_logprobs(step)

    def _with_logprobs(self, step: Tokens) -> Tokens:
        """What the request asks for, where the script says nothing of it."""
        sampling, some = self.request.sampling, TokenLogprobs(-1.0, 1, (), ())
        if sampling.logprobs is not None and not step.logprobs:
            step = replace(step, logprobs=(some,) * len(step.token_ids))
        if sampling.prompt_logprobs is not None and not step.prompt_logprobs:
            step = replace(step, prompt_logprobs=(some,) * (len(self.request.prompt_token_ids) - 1))
        return step

    def abort(self) -> None:
        self.aborted.set()
        self.ended.set()

    def finish(self) -> None:
        self.finished = True
        self.abort()


class FakeDispatcher:
    """Every request gets `script`; `started` lists their generations."""

    def __init__(self) -> None:
        self.script: list[Step] = []
        self.refusal: Exception | None = None
        self.started: list[FakeGeneration] = []

    def start(self, request: Request, timeline: Timeline, wishes: Wishes = NO_WISHES) -> FakeGeneration:
        if self.refusal is not None:
            raise self.refusal
        timeline.dispatched_s = timeline.tokenised_s
        generation = FakeGeneration(request, timeline, self.script)
        self.started.append(generation)
        return generation


class FakeFleet:
    """The provider of root key and topology; set `error` for a fleet without workers."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __call__(self, salt: bytes) -> BlockKey:
        if self.error is not None:
            raise self.error
        return root_key(b"fingerprint", salt)

    def topology(self) -> dict[str, Any]:
        if self.error is not None and not isinstance(self.error, Overloaded):
            raise self.error
        return {"ready": self.error is None, "reason": "no worker" if self.error else "", "workers": []}


@dataclass
class AsgiClient:
    """One POST on bare ASGI, with the client's end of the connection in hand."""

    app: ASGIApp
    path: str
    body: bytes
    sent: list[Message] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)  # the client closes the connection
    reads: asyncio.Event = field(default_factory=asyncio.Event)  # set at the start; cleared: writes block
    wrote: asyncio.Event = field(default_factory=asyncio.Event)  # something of the body was written
    broken: bool = False  # writes fail
    _asked: bool = False

    async def run(self) -> None:
        await self.app({"type": "http", "method": "POST", "path": self.path, "headers": []}, self._receive, self._send)

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self.broken:
            raise BrokenPipeError
        await self.reads.wait()
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.wrote.set()


@pytest.fixture(scope="session")
def model() -> ServedModel:
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return ServedModel(
        name="tiny",
        tokenizer=Tokenizer(backend),
        chat_template=ChatTemplate(TEMPLATE, {}),
        max_model_len=100,
        vocab_size=258,
        eos_token_ids=(257,),
        created_s=1_700_000_000,
    )


@pytest.fixture
def dispatcher(model: ServedModel) -> FakeDispatcher:
    """Answers "Hi 🙂!" a token at a time, then the end-of-sequence token."""
    dispatcher = FakeDispatcher()
    ids = model.tokenizer.encode("Hi 🙂!", add_special=False)
    dispatcher.script = [*(Tokens((n,)) for n in ids), Tokens((257,), FinishReason.STOP)]
    return dispatcher


@pytest.fixture
def fleet() -> FakeFleet:
    return FakeFleet()


async def check_grammar(grammar: Grammar, param: str) -> None:
    """As if each compiled but one that has a fault on its face."""
    if "fault" in grammar.source:
        raise InvalidRequest("The grammar cannot be used.", param=param)


@pytest.fixture
def service(model: ServedModel, dispatcher: FakeDispatcher, fleet: FakeFleet) -> Service:
    return Service(
        model=model,
        dispatcher=dispatcher,
        root_key=fleet,
        metrics=RouterMetrics(CollectorRegistry()),
        topology=fleet.topology,
        check_grammar=check_grammar,
        wall_clock=lambda: 1_700_000_001.5,
    )


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(service)), base_url="http://front") as client:
        yield client


@pytest.fixture
def asgi_client(service: Service) -> Any:
    """Makes an `AsgiClient`; `limits` replace those of the service."""

    def make(path: str, body: dict[str, Any], **limits: float) -> AsgiClient:
        limited = replace(service, limits=replace(service.limits, **limits))
        client = AsgiClient(make_app(limited), path, json.dumps(body).encode())
        client.reads.set()
        return client

    return make
