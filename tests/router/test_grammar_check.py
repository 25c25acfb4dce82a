"""Grammars are compiled in a process that is killed when one takes too long; the next one gets a new process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pdserve.errors import InvalidRequest, Overloaded
from pdserve.request import Grammar
from router import grammar_check
from router.grammar_check import GrammarCheck


@pytest.fixture
async def check(default_model: Path) -> AsyncIterator[GrammarCheck]:
    check = GrammarCheck(default_model / "tokenizer.json", 49152, [2])
    yield check
    await check.close()


async def test_good_and_bad(check: GrammarCheck) -> None:
    await check.check(Grammar("regex", "[a-z]+"), "tools")
    await check.check(Grammar("json_schema", '{"type": "object"}'), "tools")
    for _ in range(2):  # remembered the second time
        with pytest.raises(InvalidRequest, match="unclosed group"):
            await check.check(Grammar("regex", "(((("), "tools")


async def test_process_that_takes_too_long_is_killed_and_replaced(
    check: GrammarCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    await check.check(Grammar("regex", "a"), "tools")
    first = check._process
    assert first is not None
    monkeypatch.setattr(grammar_check, "COMPILE_S", 0.0)
    with pytest.raises(InvalidRequest, match="takes longer"):
        await check.check(Grammar("regex", "b"), "tools")
    assert first.returncode is not None
    monkeypatch.undo()
    await check.check(Grammar("regex", "c"), "tools")
    assert check._process is not first


async def test_process_that_died_between_two_grammars_is_replaced(check: GrammarCheck) -> None:
    await check.check(Grammar("regex", "a"), "tools")
    assert check._process is not None
    check._process.kill()
    await check._process.wait()
    await check.check(Grammar("regex", "b"), "tools")


async def test_process_that_dies_over_a_grammar_is_replaced(
    check: GrammarCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    await check.check(Grammar("regex", "a"), "tools")
    ask = check._ask

    async def dies(grammar: Grammar, timeout_s: float) -> str | None:
        assert check._process is not None
        check._process.kill()
        return await ask(grammar, timeout_s)

    monkeypatch.setattr(check, "_ask", dies)
    with pytest.raises(Exception, match="could not be checked"):
        await check.check(Grammar("regex", "b"), "tools")
    monkeypatch.undo()
    await check.check(Grammar("regex", "b"), "tools")


async def test_process_that_did_not_live_to_be_asked_is_started_again(
    check: GrammarCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, lost = check._ask, iter((RuntimeError("the handler is closed"),))

    async def loses(grammar: Grammar, timeout_s: float) -> str | None:
        if (error := next(lost, None)) is not None:
            raise error
        return await ask(grammar, timeout_s)

    monkeypatch.setattr(check, "_ask", loses)
    await check.check(Grammar("regex", "a"), "tools")


async def test_those_who_wait_are_bounded(check: GrammarCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "MAX_WAITING", 2)
    found = await asyncio.gather(
        *(check.check(Grammar("regex", f"a{n}"), "tools") for n in range(5)), return_exceptions=True
    )
    assert [type(each) for each in found].count(Overloaded) == 3
    assert found.count(None) == 2
