"""Grammars of clients are compiled here first, in a process that is killed when it takes too long."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pdserve.errors import InternalError, InvalidRequest, Overloaded
from pdserve.request import Grammar

COMPILE_S = 2.0
START_S = 30.0  # of the process, which reads the tokeniser
MAX_WAITING = 32
_REMEMBERED = 256
_EASY = Grammar("regex", "a")
# It has ended: a pipe without its other end (RuntimeError is uvloop's word for that), or half an answer.
_LOST = (OSError, RuntimeError, ValueError)


class GrammarCheck:
    """Use in one event loop. The process starts with the first grammar, one runs at a time."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._arguments = [str(tokenizer), str(vocab_size), *map(str, eos_token_ids)]
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._known: OrderedDict[Grammar, str | None] = OrderedDict()  # what is wrong with it

    async def check(self, grammar: Grammar, param: str) -> None:
        """Raises InvalidRequest naming `param` if it is wrong or takes too long, Overloaded when too many wait."""
        if grammar not in self._known:
            if self._waiting >= MAX_WAITING:
                raise Overloaded("Too many grammars are waiting to be compiled.")
            self._waiting += 1
            try:
                async with self._turn:
                    if grammar not in self._known:
                        self._known[grammar] = await self._compile(grammar)
            finally:
                self._waiting -= 1
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        wrong = self._known.get(grammar)
        if wrong is not None:
            raise InvalidRequest(wrong, param=param)

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _compile(self, grammar: Grammar) -> str | None:
        """A process that is found dead, or dies over it, is replaced once."""
        try:
            try:
                return await self._ask_process(grammar)
            except _LOST:
                await self.close()
                return await self._ask_process(grammar)
        except TimeoutError:
            await self.close()
            return f"The grammar takes longer than {COMPILE_S:g} s to compile."
        except _LOST as error:
            await self.close()
            raise InternalError("The grammar could not be checked.") from error
        except asyncio.CancelledError:
            await self.close()  # its answer would be taken for the next one's
            raise

    async def _ask_process(self, grammar: Grammar) -> str | None:
        if self._process is not None and self._process.returncode is not None:
            self._process = None  # it was ended between two grammars, for memory perhaps
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "pdserve.grammars", *self._arguments),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            await self._ask(_EASY, START_S)
        return await self._ask(grammar, COMPILE_S)

    async def _ask(self, grammar: Grammar, timeout_s: float) -> str | None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            self._process.stdin.write(json.dumps(asdict(grammar)).encode() + b"\n")
            await self._process.stdin.drain()
            answer = json.loads(await self._process.stdout.readline())
        return None if answer is None else str(answer)
