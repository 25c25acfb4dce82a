"""Traces as rows: public ones, from the files that their publishers offer, and a router's own log. Gzip or plain; none
comes with the project.

| kind | upstream | prefix blocks |
|---|---|---|
| mooncake | kvcache-ai/Mooncake, FAST25-release/traces, `*.jsonl` | 512 tokens, ids across all rows |
| azure | Azure/AzurePublicDataset, AzureLLMInferenceTrace, `*.csv` | none |
| agentic | callanjfox/kv-cache-tester, re-encoded: a row a request, runs of blocks | 64 tokens, ids of a session |
| recorded | `pdserve router --decision-log` | none |
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any

# Mooncake's timestamps stand on a grid of about three seconds; Azure's are exact.
MOONCAKE_GRID_S = 3.0
MOONCAKE_BLOCK_TOKENS = 512
AGENTIC_BLOCK_TOKENS = 64
# Rows of the agentic trace have times since their session began, whose median length is an hour: sessions begin within
# one, spread by the golden ratio, which leaves no gap wherever the rows end.
_AGENTIC_SPREAD_S, _GOLDEN = 3600.0, (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class Row:
    """`blocks`: ids of the prompt's blocks, the last one maybe partial; equal ids at the head are an equal prefix."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """
    Attributes:
        rows: in order of time, from 0.
        grid_s: what the timestamps are rounded to.
        block_tokens: of a full block.
    """

    name: str
    rows: tuple[Row, ...]
    grid_s: float = 0.0
    block_tokens: int = MOONCAKE_BLOCK_TOKENS

    @property
    def rate_rps(self) -> float:
        """Mean. The last grid step counts as full."""
        return len(self.rows) / max(self.rows[-1].at_s + self.grid_s, 1e-9)


def read_trace(path: Path, max_rows: int | None = None) -> Trace:
    """The first rows; the kind is told by the file's own first line.

    Raises:
        ValueError: it is of no kind that is known, or has no rows.
        OSError: it cannot be read.
    """
    rows: list[Row] = []
    azure = mooncake = agentic = False
    try:
        with _text(path) as lines:
            first = next(lines, "")
            azure, mooncake, agentic = first.startswith("TIMESTAMP,"), '"hash_ids"' in first, '"h":' in first
            found = (_azure if azure else _agentic if agentic else _json_rows)(first, lines)
            rows.extend(itertools.islice(found, max_rows) if first else ())
    except (KeyError, TypeError, ValueError, EOFError, zlib.error) as error:
        line = len(rows) + (2 if azure else 1)
        raise ValueError(f"{path} is no trace that is known, or is damaged: line {line}: {error!r}") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    rows.sort(key=lambda row: row.at_s)
    start_s = rows[0].at_s
    shifted = tuple(replace(row, at_s=row.at_s - start_s) for row in rows)
    block_tokens = AGENTIC_BLOCK_TOKENS if agentic else MOONCAKE_BLOCK_TOKENS
    return Trace(path.name.partition(".")[0], shifted, MOONCAKE_GRID_S if mooncake else 0.0, block_tokens)


def _text(path: Path) -> IO[str]:
    return io.TextIOWrapper(gzip.open(path)) if path.suffix == ".gz" else path.open()


def _json_rows(first: str, lines: Iterator[str]) -> Iterator[Row]:
    for line in itertools.chain((first,), lines):
        value = json.loads(line)
        if "received_unix_s" in value:
            output_tokens = (value["actual"] or {}).get("output_tokens", 0)
            yield _row(value["received_unix_s"], value["prompt_tokens"], output_tokens)
        else:
            blocks = tuple(map(int, value["hash_ids"]))
            yield _row(value["timestamp"] / 1e3, value["input_length"], value["output_length"], blocks)


def _azure(first: str, lines: Iterator[str]) -> Iterator[Row]:
    for value in csv.DictReader(itertools.chain((first,), lines)):
        # Seven digits of a second, of which Python reads six.
        at = datetime.fromisoformat(value["TIMESTAMP"][:26])
        yield _row(at.timestamp(), value["ContextTokens"], value["GeneratedTokens"])


def _agentic(first: str, lines: Iterator[str]) -> Iterator[Row]:
    """A row's blocks are the leading `p` of the row before it in the same (sub-)agent `a` of session `s`, then runs `h`
    of [first id, length]."""
    before: dict[tuple[int, Any], list[int]] = {}
    for line in itertools.chain((first,), lines):
        value = json.loads(line)
        session, agent = int(value["s"]), value.get("a")
        own = [id for begin, length in value["h"] for id in range(begin, begin + length)]
        before[session, agent] = blocks = before.get((session, agent), [])[: value["p"]] + own
        begins_s = _AGENTIC_SPREAD_S * (session * _GOLDEN % 1.0)
        yield _row(begins_s + value["t"], value["in"], value["out"], tuple(session << 32 | id for id in blocks))


def _row(at_s: float, prompt_tokens: Any, output_tokens: Any, blocks: tuple[int, ...] = ()) -> Row:
    row = Row(float(at_s), int(prompt_tokens), int(output_tokens), blocks)
    if row.prompt_tokens < 1 or row.output_tokens < 0 or not math.isfinite(row.at_s) or any(id < 0 for id in blocks):
        raise ValueError("a time, a length or a block id is out of range")
    return row
