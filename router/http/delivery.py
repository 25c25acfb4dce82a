"""From pieces of answers to bytes of the response, whole or streamed."""

from __future__ import annotations

import asyncio
from typing import Any

from pdserve.errors import InvalidRequest
from router.http.answer import Piece
from router.http.call import Call
from router.http.choices import Branch, Choices
from router.http.exchange import Exchange
from router.http.logprobs import LogprobsWriter, prompt_logprobs_payload
from router.http.service import Routing
from router.http.shapes import Choice, Payload, Shape, Usage, tool_call
from router.text.tokenizer import Tokenizer


class Delivery:
    """A write that waits for a slow client lets tokens gather in the generation, and they leave in one chunk; nothing
    is buffered here."""

    def __init__(
        self,
        exchange: Exchange,
        call: Call,
        choices: Choices,
        shape: Shape,
        tokenizer: Tokenizer,
        routing: Routing | None,
    ) -> None:
        self._exchange = exchange
        self._call = call
        self._choices = choices
        self._shape = shape
        self._tokenizer = tokenizer
        self._routing = routing
        self._writers = [_Writer(call, branch, shape, tokenizer) for branch in choices.branches]
        self._open = len(choices.branches)
        self._named = False
        self._tells_timeline = _tells_timeline(exchange)
        # One write at a time.
        self._turn: asyncio.Lock | None = asyncio.Lock() if self._open > 1 else None

    async def whole(self) -> None:
        made = [Choice(index) for index in range(len(self._choices.branches))]

        async def gather(index: int, branch: Branch) -> None:
            writer, choice, texts, pieces = self._writers[index], made[index], [], []
            async for piece in branch:
                texts.append(piece.text)
                pieces.append(piece)
                choice.tool_calls += [tool_call(call, len(choice.tool_calls)) for call in piece.tool_calls]
            choice.text = writer.prefix + "".join(texts)
            choice.extra = writer.extra(pieces[0] if len(pieces) == 1 else _joined(pieces))
            choice.finish_reason = branch.finish_reason

        await self._choices.run(gather)
        self._name_decision()
        best = self._choices.best()
        chosen = [made[self._choices.branches.index(branch)] for branch in best]
        about_prompts = [self._about_prompt(branch) for branch in best]
        top: Payload = {}
        for index, (choice, about_prompt) in enumerate(zip(chosen, about_prompts, strict=True)):
            choice.index = index
            if self._shape.prompt_on_top:
                top = about_prompt
            else:
                choice.extra = choice.extra | about_prompt
        payload = self._shape.whole(chosen, self._usage())
        await self._exchange.respond(200, payload | top | self._timeline_extension())

    async def stream(self) -> None:
        """Nothing is sent before the first tokens are there, so an earlier failure still gets its own status."""
        await self._choices.run(self._stream_one)

    async def _stream_one(self, index: int, branch: Branch) -> None:
        writer = self._writers[index]
        data = self._encode(self._shape.opening(index))
        async for piece in branch:
            data += self._events(index, branch, writer, piece)
            if branch.finish_reason is not None:
                data += self._encode(self._shape.end(index, branch.finish_reason))
                self._open -= 1
            last = not self._open
            if last:
                data += self._closing()
            if data:
                if not self._named:
                    self._name_decision()
                if self._turn is None:
                    await self._exchange.write(data, last=last)
                else:
                    async with self._turn:
                        await self._exchange.write(data, last=last)
                data = b""

    def _events(self, index: int, branch: Branch, writer: _Writer, piece: Piece) -> bytes:
        if writer.only_text and not piece.tool_calls:
            return self._shape.text_events(index, piece.text) if piece.text else b""
        events = b""
        first, text = not writer.begun, piece.text
        if first and writer.prefix:
            text = writer.prefix + text
        extra = writer.extra(piece)
        if first and self._call.return_token_ids:
            extra["prompt_token_ids"] = list(branch.prompt.token_ids)
        if text or extra.get("token_ids") or (extra.get("logprobs") is not None and piece.visible):
            events += self._encode(self._shape.delta(index, text, extra))
        if piece.tool_calls:
            begun = branch.num_calls - len(piece.tool_calls)
            calls = [tool_call(call, begun + i) for i, call in enumerate(piece.tool_calls)]
            events += self._encode(self._shape.tool_delta(index, calls))
        return events

    def _encode(self, chunks: list[Payload]) -> bytes:
        if self._call.continuous_usage:
            usage = self._usage().payload()
            chunks = [chunk | {"usage": usage} for chunk in chunks]
        return b"".join(map(self._shape.event, chunks))

    def _closing(self) -> bytes:
        chunks = self._shape.closing(self._usage(), self._timeline_extension())
        return self._encode(chunks) + self._shape.terminator

    def _about_prompt(self, branch: Branch) -> Payload:
        about: Payload = {}
        if self._call.return_token_ids:
            about["prompt_token_ids"] = list(branch.prompt.token_ids)
        if self._call.tells_prompt_logprobs:
            about["prompt_logprobs"] = prompt_logprobs_payload(
                branch.prompt.token_ids, branch.answer.prompt_logprobs, self._tokenizer
            )
        return about

    def _usage(self) -> Usage:
        leaders = self._choices.leaders
        return Usage(
            prompt_tokens=sum([len(branch.prompt.token_ids) for branch in leaders]),
            completion_tokens=self._choices.output_tokens,
            cached_tokens=sum([sum(branch.generation.cached_by_tier.values()) for branch in leaders]),
        )

    def _name_decision(self) -> None:
        """On the response's headers, once tokens are there: then it is made."""
        self._named = True
        if self._routing is None:
            return
        header = self._routing.decision_header(self._choices.branches[0].generation.request.request_id)
        if header is not None:
            self._exchange.extra_headers.append((b"x-pdserve-decision", header.encode("latin-1", "replace")))

    def _timeline_extension(self) -> Payload:
        """Where the time of the first choice went, for who asks with the header `x-pdserve-timeline: 1`."""
        if not self._tells_timeline:
            return {}
        generation = self._choices.branches[0].generation
        timeline = generation.timeline
        extension: dict[str, Any] = {
            "request_id": self._exchange.request_id,
            "ttft_s": timeline.ttft_s,
            "tpot_s": timeline.tpot_s,
            "stages": timeline.ttft_stages(),
            "handoff": timeline.handoff_stages(),
            "cached_tokens": dict(generation.cached_by_tier),
        }
        return {"x_pdserve": extension}


def _tells_timeline(exchange: Exchange) -> bool:
    given = exchange.headers.get(b"x-pdserve-timeline", b"0")
    if given not in (b"0", b"1"):
        raise InvalidRequest("x-pdserve-timeline is 1, for where the time of the answer went, or 0.")
    return given == b"1"


class _Writer:
    """What a choice carries beside its text.

    Attributes:
        prefix: the prompt's text, if it is to be repeated.
        begun: something was written.
        only_text: of what comes next.
    """

    def __init__(self, call: Call, branch: Branch, shape: Shape, tokenizer: Tokenizer) -> None:
        self.prefix = branch.prompt.text or ""
        self.begun = False
        self.only_text = False
        self._call = call
        self._branch = branch
        self._logprobs: LogprobsWriter | None = shape.logprobs_writer(tokenizer) if call.tells_logprobs else None

    def extra(self, piece: Piece) -> Payload:
        extra: Payload = {}
        self.only_text = not (self._logprobs or self._call.return_token_ids or self._call.continuous_usage)
        if self._logprobs is not None:
            token_ids, logprobs = list(piece.visible), [*piece.logprobs]
            if self.prefix and not self.begun:
                token_ids = [*self._branch.prompt.token_ids, *token_ids]
                logprobs = [None, *self._branch.answer.prompt_logprobs, *logprobs]  # type: ignore[list-item]
            extra["logprobs"] = self._logprobs.write(token_ids, logprobs)
        if self._call.return_token_ids:
            extra["token_ids"] = list(piece.token_ids)
        self.begun = True
        return extra


def _joined(pieces: list[Piece]) -> Piece:
    return Piece(
        "",
        token_ids=tuple(token_id for piece in pieces for token_id in piece.token_ids),
        visible=tuple(token_id for piece in pieces for token_id in piece.visible),
        logprobs=tuple(each for piece in pieces for each in piece.logprobs),
    )
