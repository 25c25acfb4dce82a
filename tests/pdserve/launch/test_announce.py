"""A starting process is understood line by line, and whatever else it writes is a failed start, never a success."""

from __future__ import annotations

import asyncio
import os

import pytest

from pdserve.launch.announce import MAX_LINE_BYTES, Announcer, StartFailed, await_ready


async def heard(data: bytes) -> tuple[dict[str, object], list[tuple[str, float | None]]]:
    pipe = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    pipe.feed_data(data)
    pipe.feed_eof()
    progress: list[tuple[str, float | None]] = []
    async with asyncio.timeout(5):
        return await await_ready(pipe, lambda text, fraction: progress.append((text, fraction))), progress


async def test_progress_then_ready() -> None:
    lines = b'{"progress": "a"}\n{"progress": "b", "fraction": 0.5}\n{"ready": true, "address": "h:1"}\n'
    values, progress = await heard(lines)
    assert values["address"] == "h:1"
    assert progress == [("a", None), ("b", 0.5)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"error": "No such model."}\n', "No such model"),
        (b"", "before it was ready"),
        (b'{"progress": "a"}\n', "before it was ready"),
        (b"ready\n", "something other"),
        (b"[1]\n", "something other"),
        (b"\xff\n", "something other"),
        (b"x" * (2 * MAX_LINE_BYTES), "something other"),
    ],
)
async def test_a_failed_start_says_why(data: bytes, message: str) -> None:
    with pytest.raises(StartFailed, match=message):
        await heard(data)


async def test_the_announcer_writes_what_is_understood() -> None:
    reading, writing = os.pipe()
    announcer = Announcer(writing)
    announcer.progress("half way", 0.5)
    announcer.ready(address="h:1")
    with os.fdopen(reading, "rb") as file:
        values, progress = await heard(file.read())  # to the end: the announcer closed its side
    assert (values["address"], progress) == ("h:1", [("half way", 0.5)])


def test_an_announcer_that_nobody_hears_is_silent() -> None:
    Announcer(None).ready()
    reading, writing = os.pipe()
    os.close(reading)
    Announcer(writing).error("nobody reads this")
