"""A sweep as report.json, for programs, and report.html, one file that needs no network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from loadtest import plots
from loadtest.result import Result, Sweep, common_rate
from loadtest.statistics import Point
from loadtest.verdict import verdict

FORMAT = 1
_TEMPLATE = "report.html.jinja"


def write_report(sweep: Sweep, folder: Path) -> None:
    """report.json and report.html into `folder`, which exists."""
    (folder / "report.json").write_text(json.dumps(as_json(sweep), indent=1, allow_nan=False) + "\n")
    (folder / "report.html").write_text(as_html(sweep))


def as_json(sweep: Sweep) -> dict[str, Any]:
    """All that was measured, in base units; what there is none of is null. `format` changes with the keys."""
    results = [{"best_rps": result.best_rps, **asdict(result)} for result in sweep.results]
    value: dict[str, Any] = _plain({"format": FORMAT, "verdict": verdict(sweep), **asdict(sweep), "results": results})
    return value


def as_html(sweep: Sweep) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"ms": _ms, "share": lambda value: "–" if value is None else f"{value:.0%}"}
    rate_rps = common_rate(sweep.results)
    return environment.get_template(_TEMPLATE).render(
        sweep=sweep,
        verdict=verdict(sweep),
        pictures=[_figure(text) for text in _pictures(sweep, rate_rps) if text],
        rate_rps=rate_rps,
        errors=_errors(sweep.results),
    )


def _pictures(sweep: Sweep, rate_rps: float | None) -> list[str]:
    results, slo = sweep.results, sweep.slo
    drawn = [plots.goodput_curve(results), plots.attainment(results)]
    if rate_rps is not None:
        at = {result.name: result.at(rate_rps) for result in results}
        when = f"at {rate_rps:.3g} req/s"
        drawn += [
            plots.latency_cdf(at, "ttft", f"TTFT {when}", slo.ttft_s),
            plots.latency_cdf(at, "tpot", f"TPOT {when}", slo.tpot_s),
            plots.latency_cdf(at, "gap", f"Gaps between tokens {when}", None),
            plots.stages(at, slo),
        ]
    return drawn


def _figure(svg: str) -> Any:
    # Drawn by us; names in it are escaped by matplotlib.
    return markupsafe.Markup(svg)


def _errors(results: Sequence[Result]) -> list[tuple[str, Point, Mapping[str, int]]]:
    return [(result.name, point, point.errors) for result in results for point in result.points if point.errors]


def _ms(value_s: float) -> str:
    return "–" if math.isnan(value_s) else f"{value_s * 1e3:,.0f}"


def _plain(value: Any) -> Any:
    """JSON has no NaN; six significant digits are more than a clock is good for."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
