"""`python -m pdserve.bench.sampling`: what sampling parameters and grammars add to a decode step of 16 sequences.

Whole engine steps, greedy and with everything on, with the compiled sampler and with torch's, in turn: medians of CPU
time, of the step and of the sampling in it, and how much longer than that of greedy rows the latter is, as a share of a
greedy step. (Whole steps of two cases differ by more than that from one moment to the next.)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from pdserve.bench.engine import CONTEXT, add, step
from pdserve.bench.result import tell
from pdserve.engine import native_sampler
from pdserve.engine.engine import Engine
from pdserve.engine.grammar import TokenGrammar
from pdserve.engine.sampler import Sampled, Sampler, SamplingRow
from pdserve.engine.torch_sampler import TorchSampler
from pdserve.grammars import Grammars
from pdserve.launch.folders import cache_folder
from pdserve.models.config import load_config
from pdserve.models.default_model import ensure_default_model
from pdserve.request import Grammar, SamplingParams, TokenLogprobs
from pdserve.worker.build import build_engine
from pdserve.worker.config import Role, WorkerConfig

BATCH = 16
GREEDY = SamplingParams(max_tokens=1000, seed=0, temperature=0.0)
SAMPLED = SamplingParams(max_tokens=1000, seed=1, temperature=0.8)
ALL_ON = SamplingParams(
    max_tokens=1000,
    seed=1,
    temperature=0.8,
    top_p=0.95,
    top_k=50,
    min_p=0.02,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    repetition_penalty=1.1,
    logit_bias=tuple((token_id, 1.0) for token_id in range(100, 120)),
)
TOLD = replace(ALL_ON, logprobs=5)
SCHEMA = '{"type":"array","items":{"type":"object","properties":{"name":{"type":"string"},"size":{"type":"integer"}},\
"required":["name","size"],"additionalProperties":false},"minItems":1000}'
SCHEMA_GRAMMAR = Grammar("json_schema", SCHEMA)
# Text in which a call may begin, as answers with strict tools have it.
FREE_GRAMMAR = Grammar(
    "lark",
    r"""start: (begun %json {"type": "object"} "</tool_call>")* TEXT?
begun[lazy]: /(.|\n)*/ "<tool_call>"
TEXT: /(.|\n)+/""",
)


class Timed(Sampler):
    """Another sampler, watched."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.times_ms: list[float] = []

    def choose(self, logits: Tensor, rows: Rows[SamplingRow]) -> list[int]:
        return self._sampler.choose(logits, rows)

    def describe(self, logits: Tensor, token_ids: Rows[int], num_top: int) -> list[TokenLogprobs]:
        return self._sampler.describe(logits, token_ids, num_top)

    def sample(self, logits: Tensor, rows: Rows[SamplingRow]) -> list[Sampled]:
        began_s = time.thread_time()
        sampled = super().sample(logits, rows)
        self.times_ms.append((time.thread_time() - began_s) * 1e3)
        return sampled


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU milliseconds."""

    step_ms: float
    sampling_ms: float  # of these


def cost(
    engine: Engine, sampler: Sampler, sampling: SamplingParams, grammars: Grammars, grammar: Grammar | None, rounds: int
) -> Cost:
    """Medians of `rounds` decode steps. The prompts are the same each time, and found in the cache."""
    timed = Timed(sampler)
    engine.runner.sampler = timed
    sequences = []
    for i in range(BATCH):
        sequence = add(engine, f"sampling {i}", CONTEXT, 1000)
        sequence.sampling = sampling
        if grammar is not None:
            sequence.grammar = TokenGrammar(grammars.submit(grammar))
        sequences.append(sequence)
    while not all(sequence.decoding for sequence in sequences):
        step(engine)
    timed.times_ms.clear()
    times_ms = []
    for _ in range(rounds):
        began_s = time.thread_time()
        step(engine)
        times_ms.append((time.thread_time() - began_s) * 1e3)
    for sequence in sequences:
        engine.finish(sequence)
    return Cost(statistics.median(times_ms), statistics.median(timed.times_ms))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = ensure_default_model(cache_folder(), lambda text, share: None)
    config = WorkerConfig(role=Role.MIXED, worker_id="bench", model=folder, kv_bytes=1 << 30, max_model_len=4096)
    engine = build_engine(config, lambda text: None).engine
    model = load_config(folder)
    grammars = Grammars(folder / "tokenizer.json", model.vocab_size, model.eos_token_ids)
    cases: dict[str, tuple[SamplingParams, Grammar | None]] = {
        "greedy": (GREEDY, None),
        "temperature": (SAMPLED, None),
        "all parameters": (ALL_ON, None),
        "all parameters and logprobs": (TOLD, None),
        "grammar": (GREEDY, SCHEMA_GRAMMAR),
        "text that may call tools": (GREEDY, FREE_GRAMMAR),
    }
    samplers: dict[str, Sampler] = {"compiled": native_sampler.load(config.threads), "torch": TorchSampler()}
    found: dict[tuple[str, str], list[Cost]] = {(each, name): [] for each in samplers for name in cases}
    for _ in range(args.repeat):
        for (each, name), costs in found.items():
            sampling, grammar = cases[name]
            costs.append(cost(engine, samplers[each], sampling, grammars, grammar, args.rounds))
    step_ms = {key: statistics.median(each.step_ms for each in costs) for key, costs in found.items()}
    sampling_ms = {key: statistics.median(each.sampling_ms for each in costs) for key, costs in found.items()}
    greedy = ("compiled", "greedy")
    adds = {key: (value - sampling_ms[greedy]) / step_ms[greedy] for key, value in sampling_ms.items()}
    result: dict[str, object] = {"batch": BATCH}
    for each in samplers:
        result[each] = {
            "step_ms": {name: round(step_ms[each, name], 2) for name in cases},
            "sampling_ms": {name: round(sampling_ms[each, name], 2) for name in cases},
            "adds": {name: round(adds[each, name], 4) for name in cases},
        }
    tell(result, args.json)


if __name__ == "__main__":
    main()
