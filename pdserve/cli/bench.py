"""`pdserve bench`: the benchmarks, each a module of its own that prints JSON."""

from __future__ import annotations

import importlib.util
import sys
from typing import Annotated

import typer

from pdserve.cli.forward import become

# name: module, and what it measures
BENCHMARKS = {
    "engine": ("pdserve.bench.engine", "engine step against the bare weight products of the same shape"),
    "sampling": ("pdserve.bench.sampling", "what sampling parameters and grammars add to a decode step"),
    "metrics": ("pdserve.bench.metrics", "what metrics cost a decode step, and a scrape of 1,000 series"),
    "speculation": ("pdserve.bench.speculation", "decode with and without prompt look-up"),
    "quantised": ("pdserve.bench.quantised", "what 4-bit weights cost: perplexity of a TEXT file, greedy agreement"),
    "kernels": ("pdserve.bench.kernels", "kernels against torch"),
    "gpu": ("pdserve.bench.gpu", "on a GPU: correctness, then speed against floors of the same run (make gpu-check)"),
    "transfer": ("kvstore.transfer.bench", "KV push against memcpy, over shared memory and TCP"),
    "store": ("kvstore.store.bench", "KV store against memcpy, disk, transfer plane and Redis"),
    "router": ("router.bench", "router overhead per request and per token"),
    "samples": ("pdserve.bench.samples", "n=8 against 8 requests: time, computed tokens, held blocks"),
    "startup": ("pdserve.bench.startup", "seconds to ready, and the memory of each process"),
    "tiers": ("pdserve.bench.tiers", "TTFT of a long prompt: computed, and found in each tier of the store"),
    "serving": ("loadtest.sweep", "disaggregated against mixed workers: goodput, TTFT, TPOT, gaps (make loadtest)"),
}


def register(app: typer.Typer) -> None:
    @app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def bench(
        context: typer.Context,
        name: Annotated[str | None, typer.Argument(help="Which one; none lists them.")] = None,
    ) -> None:
        """Run a benchmark; what follows NAME goes to it (try --help there)."""
        if name is None:
            for listed, (_, text) in available().items():
                print(f"{listed:<12} {text}")
            return
        if name not in available():
            print(f"pdserve: no benchmark is named {name}; there are {', '.join(available())}.", file=sys.stderr)
            raise typer.Exit(2)
        become(BENCHMARKS[name][0], context.args)


def available() -> dict[str, tuple[str, str]]:
    """Those of `BENCHMARKS` that are installed; looked up without importing them."""
    return {name: entry for name, entry in BENCHMARKS.items() if _exists(entry[0])}


def _exists(module: str) -> bool:
    """Whether `python -m MODULE` would find something to run."""
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError:
        return False
    return spec is not None
