"""What a starting process tells the one that started it: JSON lines on a pipe, whose number it gets as `--ready-fd`.

    {"progress": "loading the weights", "fraction": 0.4}     any number of times; the fraction may be missing
    {"ready": true, ...}  or  {"error": "one sentence"}      once; the pipe is closed after it

A line without `progress` and `error` counts as ready, whatever else it says. An end of the pipe before that means that
the process died.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_LINE_BYTES = 64 * 1024
Progress = Callable[[str, float | None], None]  # what is being done, and how much of it is, 0 to 1


class StartFailed(Exception):
    """A process did not become ready; the message is one sentence, `tail` the end of its log."""

    def __init__(self, message: str, tail: str = "") -> None:
        super().__init__(message)
        self.tail = tail


@dataclass(frozen=True, slots=True)
class Announcer:
    """The starting process's side. Without a pipe (started by hand) it is silent."""

    fd: int | None

    def progress(self, text: str, fraction: float | None = None) -> None:
        self._write({"progress": text} if fraction is None else {"progress": text, "fraction": fraction})

    def ready(self, **values: str) -> None:
        self._write({"ready": True, **values}, last=True)

    def error(self, sentence: str) -> None:
        self._write({"error": sentence}, last=True)

    def _write(self, value: Mapping[str, object], *, last: bool = False) -> None:
        if self.fd is None:
            return
        try:
            os.write(self.fd, json.dumps(value).encode() + b"\n")
        except OSError:
            return  # nobody listens any more
        if last:
            os.close(self.fd)


async def await_ready(pipe: asyncio.StreamReader, progress: Progress) -> dict[str, Any]:
    """The values of the ready line; the caller sets a deadline.

    Raises:
        StartFailed: the process announced an error, wrote something else, or closed the pipe.
    """
    while True:
        try:
            line = await pipe.readline()
            value = json.loads(line) if line else None
        except ValueError as error:  # not JSON, or a line without an end
            raise StartFailed("It wrote something other than its state to the ready pipe.") from error
        if value is None:
            raise StartFailed("It ended before it was ready.")
        if not isinstance(value, dict):
            raise StartFailed("It wrote something other than its state to the ready pipe.")
        if "error" in value:
            raise StartFailed(str(value["error"]))
        if "progress" not in value:
            return value
        fraction = value.get("fraction")
        progress(str(value["progress"]), fraction if isinstance(fraction, int | float) else None)
