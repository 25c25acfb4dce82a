"""The pictures of a report, as SVG text to stand in a page."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.result import ATTAINMENT, Result
from loadtest.statistics import Point, Spread
from pdserve.slo import Slo

# Okabe and Ito's palette, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pdserve",
    "font.size": 10.0,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
# Of lines that say what would be good.
_REFERENCE: Any = {"color": "#555555", "linewidth": 1.2, "linestyle": ":"}
_METADATA = {"Date": None, "Creator": None}


def goodput_curve(results: Sequence[Result]) -> str:
    """Good requests a second, over the rate asked for."""

    def draw(axes: Axes) -> None:
        highest = max(point.rate_rps for result in results for point in result.points)
        axes.plot([0, highest], [0, highest], **_REFERENCE, label="every request good")
        for result, colour in _coloured(results):
            rates = [point.rate_rps for point in result.points]
            axes.plot(rates, [p.goodput_rps for p in result.points], marker="o", color=colour, label=result.name)
            if result.best_rps is not None:
                axes.axvline(result.best_rps, color=colour, linewidth=0.8, linestyle="--")
        axes.set(xlabel="rate (req/s)", ylabel="goodput (req/s)", title="Goodput; dashed: highest rate that holds")
        axes.legend()

    return _svg(draw)


def attainment(results: Sequence[Result]) -> str:
    """Shares of requests that met each objective, over the rate."""

    def draw(axes: Axes) -> None:
        for result, colour in _coloured(results):
            rates = [point.rate_rps for point in result.points]
            ttft, tpot = ([100 * p.ttft_share for p in result.points], [100 * p.tpot_share for p in result.points])
            axes.plot(rates, ttft, marker="o", color=colour, label=f"{result.name}, TTFT")
            axes.plot(rates, tpot, marker="s", color=colour, linestyle="--", label=f"{result.name}, TPOT")
        axes.axhline(100 * ATTAINMENT, **_REFERENCE)
        axes.set(xlabel="rate (req/s)", ylabel="requests that met it (%)", ylim=(0, 103), title="Attainment")
        axes.legend()

    return _svg(draw)


def latency_cdf(points: Mapping[str, Point], quantity: str, title: str, objective_s: float | None) -> str:
    """Of `ttft`, `tpot` or `gap`, at one rate; targets by name."""

    def draw(axes: Axes) -> None:
        for (name, point), colour in zip(points.items(), _cycled(len(points)), strict=True):
            spread: Spread = getattr(point, quantity)
            if not math.isnan(spread.mean_s):
                axes.plot([value * 1e3 for value in spread.cdf_s], range(len(spread.cdf_s)), color=colour, label=name)
        if objective_s is not None:
            axes.axvline(objective_s * 1e3, **_REFERENCE, label="objective")
        axes.set(xlabel="ms", ylabel="requests (%)" if quantity != "gap" else "gaps (%)", title=title)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()

    return _svg(draw)


def stages(points: Mapping[str, Point], slo: Slo) -> str:
    """Mean TTFT by stage, stacked, one bar a target; empty text if no target told its stages."""
    told = {name: point.stages_s for name, point in points.items() if point.stages_s}
    if not told:
        return ""

    def draw(axes: Axes) -> None:
        names = dict.fromkeys(stage for by_stage in told.values() for stage in by_stage)
        left = [0.0] * len(told)
        for stage, colour in zip(names, _cycled(len(names)), strict=True):
            widths = [by_stage.get(stage, 0.0) * 1e3 for by_stage in told.values()]
            axes.barh(list(told), widths, left=left, color=colour, label=stage, height=0.5)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.axvline(slo.ttft_s * 1e3, **_REFERENCE, label="objective")
        axes.set(xlabel="ms", title="Mean TTFT by stage (server's timeline)")
        axes.legend(ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22))

    return _svg(draw)


def _svg(draw: Callable[[Axes], None]) -> str:
    """Without a display, a global figure or a date, so that equal data is an equal picture."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=_METADATA)
    # What comes before is a declaration that has no place inside a page.
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def _coloured(results: Sequence[Result]) -> zip[tuple[Result, str]]:
    return zip(results, _cycled(len(results)), strict=True)


def _cycled(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]
