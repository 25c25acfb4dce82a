"""The choices of one request: one generation each, begun together. Workers compute a prompt that they share once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any

from pdserve.errors import InternalError
from pdserve.request import MAX_SEED, FinishReason, Request
from pdserve.tenants import Tenant
from pdserve.timeline import Timeline
from router.generation import Generation
from router.http.answer import Answer, Piece
from router.http.call import Call, Prompt
from router.http.service import Service
from router.metrics import RouterMetrics
from router.wishes import Wishes


class Branch:
    """One choice as it is generated; iterate once it has started.

    Attributes:
        num_calls: to tools, so far.
    """

    def __init__(self, prompt: Prompt, answer: Answer, start: Callable[[], Generation]) -> None:
        self.prompt = prompt
        self.answer = answer
        self.num_calls = 0
        self._start = start
        self._generation: Generation | None = None

    @property
    def generation(self) -> Generation:
        assert self._generation is not None, "not started"
        return self._generation

    def start(self) -> None:
        """Raises Overloaded or InvalidRequest."""
        self._generation = self._start()

    def stop(self) -> None:
        if self._generation is not None:
            self._generation.abort()  # of no effect on one that has ended

    @property
    def finish_reason(self) -> str | None:
        reason = self.answer.finish_reason
        if reason is FinishReason.STOP and self.num_calls:
            return "tool_calls"
        return None if reason is None else reason.value

    @property
    def mean_logprob(self) -> float:
        return self.answer.total_logprob / max(1, self.answer.output_tokens)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Raises a ServeError if the request fails."""
        async for tokens in self.generation:
            piece = self.answer.push(tokens)
            if piece.tool_calls:
                self.num_calls += len(piece.tool_calls)
            yield piece
            if self.answer.finish_reason is not None:
                self.generation.finish()  # a stop string has ended the answer before its generation
                return
        raise InternalError("The generation ended without a reason.")

    def observe(self, metrics: RouterMetrics) -> None:
        if self._generation is not None:
            metrics.observe_generation(
                self._generation.timeline,
                prompt_tokens=len(self.prompt.token_ids),
                cached_by_tier=self._generation.cached_by_tier,
                gaps_s=self.answer.gaps_s,
                request_id=self._generation.request.request_id,
            )


class Choices:
    """`branches`: `best_of` for each prompt, in order."""

    def __init__(
        self, call: Call, service: Service, response_id: str, timeline: Timeline, wishes: Wishes, tenant: Tenant
    ) -> None:
        """Raises Overloaded."""
        self._call = call
        self.branches: list[Branch] = []
        root_key = service.root_key(service.access.cache_salt(tenant, call.cache_salt))
        for index in range(len(call.prompts) * call.best_of):
            prompt, sample = call.prompts[index // call.best_of], index % call.best_of
            sampling, own = call.sampling, timeline
            if sample:  # samples of one prompt differ; those of several prompts are what each alone would give
                sampling = replace(sampling, seed=(sampling.seed + sample) & MAX_SEED)
            if index:
                own = replace(timeline, reported={})
            request = Request(
                # Clients choose X-Request-Id and may repeat it; inside, an id must be unique.
                request_id=f"{response_id}-{index}" if index else response_id,
                prompt_token_ids=prompt.token_ids,
                sampling=sampling,
                root_key=root_key,
                tenant=tenant.name,
                deadline_s=timeline.received_s + service.limits.request_s,
            )
            answer = Answer(call, service.model.tokenizer, service.clock)
            self.branches.append(
                Branch(prompt, answer, lambda r=request, t=own: service.dispatcher.start(r, t, wishes))  # type: ignore[misc]
            )

    @property
    def output_tokens(self) -> int:
        return sum([branch.answer.output_tokens for branch in self.branches])

    @property
    def leaders(self) -> list[Branch]:
        """The first branch of each prompt."""
        return self.branches[:: self._call.best_of]

    async def run(self, deliver: Callable[[int, Branch], Coroutine[Any, Any, None]]) -> None:
        """Each branch goes through `deliver`. The first failure ends all, and is raised."""
        for branch in self.branches:
            branch.start()
        if len(self.branches) == 1:
            await deliver(0, self.branches[0])
            return
        try:
            async with asyncio.TaskGroup() as group:
                for index, branch in enumerate(self.branches):
                    group.create_task(deliver(index, branch))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    def best(self) -> list[Branch]:
        """The `n` likeliest of each prompt, most likely first when some are left out."""
        n, best_of = self._call.n, self._call.best_of
        if n == best_of:
            return self.branches
        groups = [self.branches[i : i + best_of] for i in range(0, len(self.branches), best_of)]
        return [each for group in groups for each in sorted(group, key=lambda b: -b.mean_logprob)[:n]]

    def stop(self) -> None:
        for branch in self.branches:
            branch.stop()

    def observe(self, metrics: RouterMetrics) -> None:
        for branch in self.branches:
            branch.observe(metrics)
