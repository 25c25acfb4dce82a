"""Writes the Grafana dashboards of the chart from the tables below: `make docs`. A test fails when they are stale.

A panel is a title, a unit and queries with their legends; every query is narrowed to the chosen namespaces.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "pdserve" / "dashboards"
FILTERS = 'namespace=~"$namespace", model_name=~"$model_name"'
RATE = "[$__rate_interval]"
WIDTH, HEIGHT = 12, 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Panel:
    """
    Attributes:
        unit: of Grafana: s, Bps, reqps, percentunit, short, ...
        queries: legend to PromQL.
        note: shown behind the panel's `i`.
    """

    title: str
    unit: str
    queries: dict[str, str]
    note: str = ""
    stacked: bool = False
    heatmap: bool = False  # the one query gives buckets


Rows = dict[str, tuple[Panel, ...]]  # in the order of the page


def rate(name: str, by: str = "", where: str = "") -> str:
    filters = f"{FILTERS}, {where}" if where else FILTERS
    return f"sum by ({by}) (rate({name}{{{filters}}}{RATE}))" if by else f"sum(rate({name}{{{filters}}}{RATE}))"


def gauge(name: str, by: str, where: str = "", how: str = "sum") -> str:
    filters = f"{FILTERS}, {where}" if where else FILTERS
    return f"{how} by ({by}) ({name}{{{filters}}})"


def quantiles(name: str, where: str = "") -> dict[str, str]:
    inner = rate(f"{name}_bucket", "le", where)
    return {f"p{q}": f"histogram_quantile(0.{q}, {inner})" for q in (50, 95, 99)}


def heat(name: str, where: str = "") -> dict[str, str]:
    return {"{{le}}": rate(f"{name}_bucket", "le", where)}


def good_share() -> str:
    good = rate("pdserve_slo_requests_total", "slo_class", 'missed_by="none"')
    return f"{good} / {rate('pdserve_slo_requests_total', 'slo_class')}"


def within(name: str, le: str) -> str:
    """The share of observations up to `le` seconds, an edge of the histogram."""
    good = rate(f"{name}_bucket", where=f'le="{le}"')
    return f"{good} / {rate(f'{name}_count')}"


def mean(name: str, by: str, where: str = "") -> str:
    return f"{rate(f'{name}_sum', by, where)} / {rate(f'{name}_count', by, where)}"


def stage(family: str, name: str, count: str) -> str:
    """Mean seconds of a stage a request, so that stages stack up to the whole's mean."""
    seconds = rate(f"{family}_sum", where=f'stage="{name}"')
    return f"{seconds} / {rate(f'{count}_count')}"


TTFT_STAGES = ("tokenise", "route", "wait", "fetch", "queue", "compute", "deliver")
HANDOFF_STAGES = ("reserve", "transfer", "commit", "resume")
HANDOFF = "pdserve_handoff_stage_seconds"
WAITING = Panel(
    "Requests in the routers' queues",
    "short",
    {"for {{waits_for}}": gauge("pdserve_queue_requests", "waits_for")},
    "By what they wait for: prefill, decode (no batch has room within its TPOT), or any worker.",
    stacked=True,
)
REFUSED = Panel("Refused requests", "reqps", {"{{reason}}": rate("pdserve_refused_requests_total", "reason")})
GOODPUT = (
    Panel(
        "Goodput",
        "reqps",
        {"{{slo_class}}": rate("pdserve_slo_requests_total", "slo_class", 'missed_by="none"')},
        "Requests whose TTFT and TPOT both met their SLO class.",
        stacked=True,
    ),
    Panel("Share of good requests", "percentunit", {"{{slo_class}}": good_share()}, "Refused and failed ones count."),
)

OVERVIEW: Rows = {
    "Requests": (
        Panel("Requests by outcome", "reqps", {"{{outcome}}": rate("pdserve_requests_total", "outcome")}),
        Panel(
            "Share of failed requests",
            "percentunit",
            {
                "5xx": "({} or vector(0)) / {}".format(
                    rate("pdserve_requests_total", where='outcome=~"5.."'), rate("pdserve_requests_total")
                )
            },
        ),
        Panel("Requests in flight", "short", {"{{pod}}": gauge("pdserve_requests_in_flight", "pod")}),
        Panel(
            "Tokens",
            "short",
            {
                "prompt": rate("pdserve_prompt_tokens_total"),
                "cached": rate("pdserve_cached_tokens_total"),
                "output": rate("pdserve_output_tokens_total"),
            },
            "A second.",
        ),
    ),
    "Goodput": (
        *GOODPUT,
        Panel(
            "What broke the objective",
            "reqps",
            {"{{missed_by}}": rate("pdserve_slo_requests_total", "missed_by", 'missed_by!="none"')},
            "The first stage at whose end it was broken; refused: by admission.",
            stacked=True,
        ),
        REFUSED,
        WAITING,
        Panel(
            "Predicted wait",
            "s",
            {"{{slo_class}}": gauge("pdserve_queue_predicted_wait_seconds", "slo_class", how="max")},
            "Of a short prompt that would come now.",
        ),
    ),
    "Latency and objectives": (
        Panel("TTFT, all requests", "s", heat("pdserve_ttft_seconds"), heatmap=True),
        Panel("TTFT", "s", quantiles("pdserve_ttft_seconds"), "Receipt to first token."),
        Panel("TPOT", "s", quantiles("pdserve_tpot_seconds"), "Mean gap after the first token, a request."),
        Panel("Gaps between deliveries", "s", quantiles("pdserve_itl_seconds")),
        Panel("Receipt to last token", "s", quantiles("pdserve_e2e_seconds")),
        Panel(
            "Attainment",
            "percentunit",
            {
                "TTFT within 1 s": within("pdserve_ttft_seconds", "1.0"),
                "TPOT within 0.1 s": within("pdserve_tpot_seconds", "0.1"),
            },
            "Each objective alone. A request is good if it meets both, so goodput is at most the lower one.",
        ),
    ),
    "Fleet": (
        Panel(
            "Workers the routers know",
            "short",
            {"{{role}} {{state}}": gauge("pdserve_router_workers", "role, state", how="max")},
        ),
        Panel("KV pool in use", "percentunit", {"{{pod}}": gauge("pdserve_kv_usage_ratio", "pod", how="max")}),
    ),
}

PIPELINE: Rows = {
    "Where the time goes": (
        Panel(
            "Stages of TTFT",
            "s",
            {name: stage("pdserve_ttft_stage_seconds", name, "pdserve_ttft_seconds") for name in TTFT_STAGES},
            "Means; they stack up to the mean TTFT.",
            stacked=True,
        ),
        Panel(
            "Stages of the hand-over",
            "s",
            {name: mean(HANDOFF, "stage", f'stage="{name}"') for name in HANDOFF_STAGES},
            "Means; they stack up to the gap between the first and the second token.",
            stacked=True,
        ),
    ),
    "1 Router": (
        Panel("Tokenise and route", "s", quantiles("pdserve_ttft_stage_seconds", 'stage=~"tokenise|route"')),
        Panel("Requests that workers have", "short", {"{{pod}}": gauge("pdserve_router_active_requests", "pod")}),
        Panel(
            "Decisions",
            "reqps",
            {"{{phase}} {{outcome}}": rate("pdserve_router_decisions_total", "phase, outcome")},
            "prompt: prefill, which hands over; whole: a role is missing; decode: takes over; resume: from the store.",
        ),
        Panel("Retries by cause", "short", {"{{event}}": rate("pdserve_router_events_total", "event")}, "A second."),
    ),
    "2 Admission and queue": (
        Panel("Wait in the router's queue", "s", quantiles("pdserve_queue_seconds")),
        WAITING,
        Panel(
            "Prompt tokens in the routers' queues",
            "short",
            {"for {{waits_for}}": gauge("pdserve_queue_tokens", "waits_for")},
            "Uncached ones. Prefill is scaled by these and by what its workers have.",
            stacked=True,
        ),
        Panel(
            "Verdicts of admission",
            "reqps",
            {"{{reason}}": rate("pdserve_admission_verdicts_total", "reason")},
            "The objective that the forecast misses; in shadow mode nothing follows.",
        ),
        REFUSED,
        Panel(
            "Verdicts that were right",
            "percentunit",
            {
                "{{verdict}}": rate("pdserve_admission_checked_total", "verdict", 'outcome="right"')
                + " / "
                + rate("pdserve_admission_checked_total", "verdict")
            },
        ),
        Panel(
            "Prompts that workers have",
            "s",
            {"{{worker}}": gauge("pdserve_router_backlog_seconds", "worker", 'role!="decode"', how="max")},
            "Until they are computed, as predicted. The rest waits in the router, so this stays low.",
        ),
        Panel("Wait on the worker", "s", quantiles("pdserve_ttft_stage_seconds", 'stage="queue"')),
    ),
    "3 Prefill": (
        Panel("Compute", "s", quantiles("pdserve_ttft_stage_seconds", 'stage="compute"')),
        Panel("Tokens computed", "short", {"{{pod}}": rate("pdserve_computed_tokens_total", "pod")}, "A second."),
    ),
    "4 Transfer": (
        Panel("Time of a hand-over's transfer", "s", quantiles("pdserve_transfer_seconds")),
        Panel("Time of all of them", "s", heat("pdserve_transfer_seconds"), heatmap=True),
        Panel("Bytes of a hand-over", "bytes", quantiles("pdserve_transfer_size_bytes")),
        Panel(
            "Links, as probed",
            "Bps",
            {
                "{{pod}} to {{peer}}, {{transport}}": gauge(
                    "pdserve_link_bandwidth_bytes_per_second", "pod, peer, transport"
                )
            },
        ),
        Panel("Bytes", "Bps", {"{{direction}}": rate("pdserve_transfer_bytes_total", "direction")}),
        Panel(
            "Failures",
            "short",
            {
                "all": f"{rate('pdserve_transfer_failures_total')} or vector(0)",
                "late": rate("pdserve_late_landings_total"),
            },
            "A second. PdserveTransferFailures tells the reason.",
        ),
    ),
    "5 Decode admission": (
        Panel("Wait for room", "s", quantiles(HANDOFF, 'stage="reserve"')),
        Panel("First token to second", "s", quantiles("pdserve_handoff_seconds"), "Of what was handed over."),
        Panel("KV blocks", "short", {"{{state}}": gauge("pdserve_kv_blocks", "state")}, stacked=True),
        Panel(
            "Preempted sequences", "short", {"{{pod}}": rate("pdserve_preempted_sequences_total", "pod")}, "A second."
        ),
    ),
    "6 Decode": (
        Panel("Sequences running", "short", {"{{pod}}": gauge("pdserve_sequences", "pod", 'state="running"')}),
        Panel("Step", "s", quantiles("pdserve_step_seconds")),
        Panel("Tokens sampled", "short", {"{{pod}}": rate("pdserve_sampled_tokens_total", "pod")}, "A second."),
    ),
}

CACHE: Rows = {
    "Prefix cache": (
        Panel(
            "Share of prompt tokens that were not computed",
            "percentunit",
            {
                "{{tier}}": rate("pdserve_cached_tokens_total", "tier")
                + " / on () group_left () "
                + rate("pdserve_prompt_tokens_total")
            },
            stacked=True,
        ),
        Panel(
            "Wrong answers of the prefix index",
            "percentunit",
            {
                f"{what}": rate("pdserve_router_index_blocks_total", where=f'what="{what}"')
                + f" / clamp_min({rate('pdserve_router_index_blocks_total', where=of)}, 1)"
                for what, of in (("false_hit", 'what="predicted"'), ("false_miss", 'what="found"'))
            },
        ),
        Panel("Keys in the routers' index", "short", {"{{pod}}": gauge("pdserve_router_index_keys", "pod")}),
    ),
    "Store tiers": (
        Panel(
            "Share of look-ups found, by tier",
            "percentunit",
            {
                "{{tier}}": rate("pdserve_store_hit_blocks_total", "tier")
                + " / on () group_left () ("
                + rate("pdserve_store_hit_blocks_total")
                + " + "
                + rate("pdserve_store_missed_blocks_total")
                + ")"
            },
            stacked=True,
        ),
        Panel("Workers fetch", "Bps", {"{{tier}}": rate("pdserve_store_fetched_bytes_total", "tier")}),
        Panel("Workers save", "Bps", {"{{pod}}": rate("pdserve_store_saved_bytes_total", "pod")}),
        Panel("Slots of the host tier", "short", {"{{state}}": gauge("pdserve_store_slots", "state")}, stacked=True),
        Panel(
            "Blocks read",
            "short",
            {
                "{{tier}}": rate("pdserve_store_hit_blocks_total", "tier"),
                "missed": rate("pdserve_store_missed_blocks_total"),
            },
            "A second.",
        ),
        Panel("Held", "bytes", {"{{tier}}": gauge("pdserve_store_bytes", "tier")}),
        Panel(
            "Share in use",
            "percentunit",
            {"{{tier}}": f"{gauge('pdserve_store_bytes', 'tier')} / {gauge('pdserve_store_capacity_bytes', 'tier')}"},
        ),
        Panel("Evicted blocks", "short", {"{{tier}}": rate("pdserve_store_evicted_blocks_total", "tier")}, "A second."),
        Panel("Fetched", "Bps", {"{{tier}}": rate("pdserve_store_fetch_bytes_total", "tier")}),
        Panel("Saved", "Bps", {"{{tier}}": rate("pdserve_store_save_bytes_total", "tier")}),
        Panel("Waiting for the disk", "bytes", {"{{pod}}": gauge("pdserve_store_write_behind_bytes", "pod")}),
        Panel(
            "Left alone",
            "short",
            {"{{pod}} {{target}}": gauge("pdserve_store_breaker_open", "pod, target", how="max")},
            "1 while disk, index or a peer is not asked.",
        ),
    ),
}

LOADTEST: Rows = {
    "Offered and served": (
        Panel(
            "Requests",
            "reqps",
            {
                "all": rate("pdserve_requests_total"),
                "answered": rate("pdserve_requests_total", where='outcome=~"stop|length"'),
            },
        ),
        Panel(
            "In flight",
            "short",
            {
                "router": gauge("pdserve_requests_in_flight", "namespace"),
                "workers": gauge("pdserve_router_active_requests", "namespace"),
            },
        ),
    ),
    "Objectives": (
        *GOODPUT,
        REFUSED,
        Panel("TTFT", "s", quantiles("pdserve_ttft_seconds")),
        Panel("TPOT", "s", quantiles("pdserve_tpot_seconds")),
        Panel(
            "TTFT attainment by objective",
            "percentunit",
            {f"{le} s": within("pdserve_ttft_seconds", le) for le in ("0.25", "0.5", "1.0", "2.5", "5.0")},
        ),
        Panel(
            "TPOT attainment by objective",
            "percentunit",
            {f"{le} s": within("pdserve_tpot_seconds", le) for le in ("0.025", "0.05", "0.1", "0.2")},
        ),
    ),
    "What saturates": (
        WAITING,
        Panel(
            "Prompt tokens that wait",
            "short",
            {
                "in the routers, for {{waits_for}}": gauge("pdserve_queue_tokens", "waits_for"),
                "on workers": f"sum(pdserve_waiting_tokens{{{FILTERS}}})",
            },
            stacked=True,
        ),
        Panel(
            "KV pool in use, fullest worker",
            "percentunit",
            {"{{component}}": gauge("pdserve_kv_usage_ratio", "component", how="max")},
        ),
        Panel(
            "Sequences running", "short", {"{{component}}": gauge("pdserve_sequences", "component", 'state="running"')}
        ),
        Panel("Step tokens, mean", "short", {"{{pod}}": mean("pdserve_step_tokens", "pod")}),
    ),
}

BOARDS = {
    "overview": ("pdserve / overview", OVERVIEW),
    "pipeline": ("pdserve / disaggregated pipeline", PIPELINE),
    "cache": ("pdserve / cache by tier", CACHE),
    "loadtest": ("pdserve / load test", LOADTEST),
}


def heatmap_json() -> dict[str, Any]:
    return {
        "type": "heatmap",
        "fieldConfig": {"defaults": {"unit": "s"}, "overrides": []},
        "options": {"calculate": False, "yAxis": {"unit": "s"}, "color": {"scheme": "Oranges", "mode": "scheme"}},
    }


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    stacking = {"mode": "normal", "group": "A"} if panel.stacked else {"mode": "none", "group": "A"}
    drawn = {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.note,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": {"fillOpacity": 30 if panel.stacked else 5, "stacking": stacking, "showPoints": "never"},
            },
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend}
            | ({"format": "heatmap"} if panel.heatmap else {})
            for place, (legend, expr) in enumerate(panel.queries.items())
        ],
    }
    return drawn | heatmap_json() if panel.heatmap else drawn


def panels_json(rows: Rows) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    y = 0
    for title, panels in rows.items():
        found.append(
            {
                "id": len(found) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
                "panels": [],
            }
        )
        y += 1
        for place, panel in enumerate(panels):
            x = (place % 2) * WIDTH
            found.append(panel_json(panel, len(found) + 1, x, y + place // 2 * HEIGHT))
        y += (len(panels) + 1) // 2 * HEIGHT
    return found


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "label": label,
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def board_json(name: str) -> dict[str, Any]:
    title, rows = BOARDS[name]
    return {
        "uid": f"pdserve-{name}",
        "title": title,
        "tags": ["pdserve"],
        "schemaVersion": 39,
        "graphTooltip": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
                variable("namespace", "Namespace", "label_values(pdserve_build_info, namespace)"),
                variable(
                    "model_name", "Model", 'label_values(pdserve_build_info{namespace=~"$namespace"}, model_name)'
                ),
            ]
        },
        "panels": panels_json(rows),
    }


def render(name: str) -> str:
    return json.dumps(board_json(name), indent=1) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in BOARDS:
        path = FOLDER / f"{name}.json"
        if "--check" not in sys.argv:
            path.write_text(render(name))
        elif path.read_text() != render(name):
            sys.exit(f"{path.name} is stale: run make docs")
