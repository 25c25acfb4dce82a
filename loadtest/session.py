"""What one client asks: a session of one turn or several, each sent when the answer to the one before is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Turn:
    """One request.

    Attributes:
        prompt: token ids are a whole prompt, for /completions; text is the next message of a chat.
        output_tokens: exactly that many are asked for.
        think_s: seconds between the answer before and this.
    """

    prompt: tuple[int, ...] | str
    output_tokens: int
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Session:
    """`at_s`: seconds from the start of the run to the first turn; `system`: the system message of a chat."""

    at_s: float
    turns: tuple[Turn, ...]
    system: str = ""


def fitted(sessions: Iterable[Session], rate_rps: float, duration_s: float) -> list[Session]:
    """The first of an endless stream that come to `rate_rps` requests a second, one session at least, with time
    stretched so that the next would be due at the end.

    In a short window the count of a Poisson process is far from its mean; given the count, it is still Poisson.
    """
    kept: list[Session] = []
    requests, wanted = 0, max(1, round(rate_rps * duration_s))
    for session in sessions:
        if requests >= wanted:
            stretch = duration_s / max(session.at_s, 1e-9)
            return [replace(one, at_s=one.at_s * stretch) for one in kept]
        kept.append(session)
        requests += len(session.turns)
    raise ValueError("the stream of sessions has an end")


@dataclass(frozen=True, slots=True)
class Request:
    """Path under the target's prefix, and body without model and stream options."""

    path: str
    body: dict[str, Any]


def request_of(session: Session, number: int, answers: Sequence[str]) -> Request:
    """The request of turn `number`, given the answers to all turns before it."""
    turn = session.turns[number]
    # ignore_eos is what vLLM and SGLang call it too: without it lengths would be the model's choice.
    options = {"max_tokens": turn.output_tokens, "temperature": 0, "ignore_eos": True}
    if not isinstance(turn.prompt, str):
        return Request("/completions", {"prompt": turn.prompt, **options})
    messages = [{"role": "system", "content": session.system}] if session.system else []
    for earlier, answer in zip(session.turns[:number], answers, strict=True):
        messages += [_message("user", earlier.prompt), _message("assistant", answer)]
    return Request("/chat/completions", {"messages": [*messages, _message("user", turn.prompt)], **options})


def _message(role: str, content: object) -> dict[str, str]:
    assert isinstance(content, str), "a session is all chat or all token ids"
    return {"role": role, "content": content}
