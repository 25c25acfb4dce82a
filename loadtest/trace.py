"""Public traces as rows, read from the files that their publishers offer (gzip or plain). None comes with the project.

| kind | upstream | prefix blocks |
|---|---|---|
| mooncake | kvcache-ai/Mooncake, FAST25-release/traces, `*.jsonl` | 512 tokens, ids across all rows |
| azure | Azure/AzurePublicDataset, AzureLLMInferenceTrace, `*.csv` | none |
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

# Mooncake's timestamps stand on a grid of about three seconds; Azure's are exact.
MOONCAKE_GRID_S = 3.0
MOONCAKE_BLOCK_TOKENS = 512


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
    with _text(path) as lines:
        first = next(lines, "")
        azure = first.startswith("TIMESTAMP,")
        try:
            found = _azure(csv.DictReader(itertools.chain((first,), lines))) if azure else _mooncake(first, lines)
            rows = list(itertools.islice(found, max_rows))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no trace that is known: {error!r}") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    rows.sort(key=lambda row: row.at_s)
    start_s = rows[0].at_s
    shifted = tuple(Row(r.at_s - start_s, r.prompt_tokens, r.output_tokens, r.blocks) for r in rows)
    return Trace(path.name.partition(".")[0], shifted, 0.0 if azure else MOONCAKE_GRID_S)


def _text(path: Path) -> IO[str]:
    return io.TextIOWrapper(gzip.open(path)) if path.suffix == ".gz" else path.open()


def _mooncake(first: str, lines: Iterator[str]) -> Iterator[Row]:
    for line in itertools.chain((first,), lines):
        value = json.loads(line)
        blocks = tuple(map(int, value["hash_ids"]))
        yield Row(value["timestamp"] / 1e3, int(value["input_length"]), int(value["output_length"]), blocks)


def _azure(table: csv.DictReader[str]) -> Iterator[Row]:
    for value in table:
        # Seven digits of a second, of which Python reads six.
        at = datetime.fromisoformat(value["TIMESTAMP"][:26])
        yield Row(at.timestamp(), int(value["ContextTokens"]), int(value["GeneratedTokens"]))
