"""`python -m router.replay` (what `pdserve replay` runs)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pdserve.errors import ConfigError
from pdserve.slo import Slo
from pdserve.trace import Trace, read_trace
from router.policy import POLICIES, Policy, Speed
from router.replay.outcome import Outcome
from router.replay.run import replay_all
from router.replay.setting import REPORT_S, Outage, Setting, arrivals
from router.slo import CLASSES, STANDARD

_STANDARD = CLASSES[STANDARD]
_MIN_WIDTH = 120


def main(
    trace: Annotated[Path, typer.Argument(help="Mooncake (JSON lines), Azure (CSV) or a router's --decision-log.")],
    policy: Annotated[str, typer.Option(help=f"One or more of {', '.join(POLICIES)}.")] = "cost,round_robin",
    workers: Annotated[int, typer.Option(min=1, help="How many; all do prefill and decode.")] = 16,
    worker_tokens: Annotated[int, typer.Option(min=1, help="Tokens of KV that a worker keeps.")] = 1_000_000,
    prefill_rate: Annotated[float, typer.Option(min=1.0, help="Prompt tokens/s that a worker computes.")] = 10_000.0,
    speedup: Annotated[float, typer.Option(min=1e-6, help="Arrivals so many times as fast.")] = 1.0,
    max_requests: Annotated[int | None, typer.Option(min=1, help="Only the first ones.")] = None,
    ttft_s: Annotated[float, typer.Option(min=0.0, help="Objective of a good request.")] = _STANDARD.ttft_s,
    tpot_s: Annotated[float, typer.Option(min=0.0, help="Objective of a good request.")] = _STANDARD.tpot_s,
    outage: Annotated[list[str] | None, typer.Option(help="WORKER:FROM_S:UNTIL_S: it dies and joins again.")] = None,
    copy_token_bytes: Annotated[
        int, typer.Option(min=0, help="KV bytes of a token: hot prefixes are copied, as with a store; 0: they are not.")
    ] = 0,
    routers: Annotated[int, typer.Option(min=1, help="Each knows its own choices; of others what is reported.")] = 1,
    report_s: Annotated[float, typer.Option(min=1e-3, help="Workers report to routers so often.")] = REPORT_S,
    seed: Annotated[int, typer.Option(help="Of the spread of arrivals that the trace rounds, and over routers.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Replay a trace through routing policies under a virtual clock."""
    try:
        found = _read(trace, max_requests)
        setting = Setting(
            workers,
            found.block_tokens,
            worker_tokens,
            Speed(prefill_tokens_per_s=((1, prefill_rate),)),
            Slo(ttft_s, tpot_s),
            tuple(_outage(text, workers) for text in outage or ()),
            copy_token_bytes,
            routers,
            report_s,
            seed,
        )
        outcomes = replay_all(_policies(policy), setting, arrivals(found, speedup, seed))
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        print(json.dumps([each.describe() for each in outcomes], indent=2))
    else:
        _show(outcomes)


def _read(path: Path, max_requests: int | None) -> Trace:
    try:
        return read_trace(path, max_requests)
    except OSError as error:
        raise ConfigError(f"The trace {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


def _policies(names: str) -> list[Policy]:
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in POLICIES]
    if unknown or not wanted:
        raise ConfigError(f"No policy is named {', '.join(unknown) or 'so'}; there are {', '.join(POLICIES)}.")
    return [POLICIES[name] for name in wanted]


def _outage(text: str, workers: int) -> Outage:
    try:
        worker, from_s, until_s = text.split(":")
        found = Outage(int(worker), float(from_s), float(until_s))
    except ValueError as error:
        raise ConfigError(f"--outage {text} is not WORKER:FROM_S:UNTIL_S.") from error
    if not (0 <= found.worker < workers and 0.0 <= found.from_s < found.until_s):
        raise ConfigError(f"--outage {text}: workers are 0 to {workers - 1}, and it must end after it begins.")
    return found


def _show(outcomes: list[Outcome]) -> None:
    console = Console(width=max(Console().width, _MIN_WIDTH))
    table = Table(
        *("policy", "hit ratio", "max:mean work", "worst 60 s", "TTFT p50 / p99 s", "TPOT p50 / p99 s"),
        *("good", "goodput req/s", "failed", "copied"),
        box=None,
    )
    for each in outcomes:
        table.add_row(
            each.policy,
            f"{each.hit_ratio:.3f}",
            f"{each.imbalance:.2f}",
            f"{each.imbalance_60s:.2f}",
            f"{each.ttft_p50_s:.2f} / {each.ttft_p99_s:.2f}",
            f"{each.tpot_p50_s:.3f} / {each.tpot_p99_s:.3f}",
            f"{each.good_ratio:.1%}",
            f"{each.goodput_rps:.2f}",
            str(each.failed),
            f"{each.copied_bytes / 2**30:.2f} GiB",
        )
    console.print(table)
    took_s = sum(each.requests / each.replayed_requests_per_s for each in outcomes)
    console.print(f"{outcomes[0].requests} requests a policy, replayed in {took_s:.1f} s")


if __name__ == "__main__":
    typer.run(main)
