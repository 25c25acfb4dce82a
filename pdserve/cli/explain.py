"""`pdserve explain ID`: why a request went where it went, and what was predicted against what happened."""

from __future__ import annotations

import json
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

from pdserve.errors import ConfigError
from pdserve.launch.http_front import URL_HELP, get_json, router_url

_WIDEST = 300  # a table that a terminal breaks into lines still tells more than one with names cut off


def register(app: typer.Typer) -> None:
    @app.command("explain")
    def explain(
        request_id: Annotated[str, typer.Argument(metavar="ID", help="The response's id, or your X-Request-Id.")],
        url: Annotated[str | None, typer.Option(help=URL_HELP)] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Print the decision record of a request."""
        router = router_url(url)
        try:
            record = get_json(router, f"/v1/requests/{quote(request_id, safe='')}/explain")
        except OSError as error:
            raise ConfigError(f"The router {router} does not answer: {error}.") from error
        except ValueError as error:
            raise ConfigError(f"The router {router} cannot explain {request_id}: {error}") from error
        if as_json:
            print(json.dumps(record, indent=2))
        else:
            _show(record)


def _show(record: dict[str, Any]) -> None:
    console = Console(width=max(Console().width, _WIDEST), highlight=False)
    state = f"ended with {record['end']}" if record["end"] is not None else "has not ended yet"
    console.print(f"{record['request_id']}: {record['prompt_tokens']} prompt tokens, {state}")
    for decision in record["decisions"]:
        console.print(
            f"\n{decision['phase']} by {decision['policy']}: {decision['chosen'] or 'nobody'}, "
            f"prefix {decision['hit_blocks']} of {decision['best_hit_blocks']} blocks that some worker holds, "
            f"{decision['fetched_blocks']} more from the store; {decision['reachable_blocks']} were in reach"
        )
        console.print(_candidates(decision))
        for rejected in decision["filtered"]:
            console.print(f"  not {rejected['worker_id']}: {rejected['reason']}")
    if verdict := record.get("admission"):
        console.print(f"\nadmission: {_verdict(verdict)}")
    if copy := record.get("hot_prefix"):
        size = f"{copy['blocks']} blocks, {copy['num_bytes'] / 1e6:.1f} MB"
        console.print(
            f"\nits prefix is hot (load {copy['load']:.2f}): {copy['worker_id']} was asked to load it, {size}"
        )
    actual = record["actual"] or {}
    console.print("\nTTFT ", _against(record["predicted"]["ttft_s"], actual.get("ttft_s")))
    console.print("TPOT ", _against(record["predicted"]["tpot_s"], actual.get("tpot_s")))
    for stage, seconds in {**actual.get("ttft_stages_s", {}), **actual.get("handoff_stages_s", {})}.items():
        console.print(f"  {stage:<10} {seconds * 1e3:10.2f} ms")
    if record["missed_by"]:
        console.print(f"missed its objective ({record['slo']['name']}) by {record['missed_by']}")


def _candidates(decision: dict[str, Any]) -> Table:
    terms = list(decision["candidates"][0]["terms_s"]) if decision["candidates"] else []
    table, takes_over = Table(box=None), decision["phase"] in ("decode", "resume")
    for title in ("worker, times in ms", "cost", *terms, "hit blocks", "to fetch", "to compute", "to move", "link"):
        table.add_column(title, no_wrap=True)
    for each in decision["candidates"]:
        mark = {decision["chosen"]: " <", decision["runner_up"]: " 2nd"}.get(each["worker_id"], "")
        table.add_row(
            each["worker_id"] + mark,
            _in_ms(each["cost_s"]),
            *(_in_ms(each["terms_s"][term]) for term in terms),
            str(each["hit_blocks"]),
            _fetch(each["fetch"]),
            "-" if takes_over else f"{each['uncached_tokens']} tokens, {_in_ms(each['compute_s'])}",
            f"{each['move_bytes'] / 1e6:.1f} MB",
            each["link"] or "-",
        )
    return table


def _verdict(verdict: dict[str, Any]) -> str:
    forecast = verdict["forecast"]
    foreseen = f"TTFT {_ms(forecast['ttft_s'])} and TPOT {_ms(forecast['tpot_s'])} foreseen"
    if verdict["reason"] is None:
        return f"taken, {foreseen}"
    return f"{'refused' if verdict['refused'] else 'would have been refused'} ({verdict['reason']}), {foreseen}"


def _fetch(fetch: dict[str, Any]) -> str:
    return f"{fetch['blocks']} blocks ({fetch['tier']}), {_in_ms(fetch['seconds'])}" if fetch["blocks"] else "-"


def _against(predicted_s: float | None, actual_s: float | None) -> str:
    return f"predicted {_ms(predicted_s)}, was {_ms(actual_s)}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{_in_ms(seconds)} ms"


def _in_ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
