"""`python -m pdserve.bench.sampling`: what sampling parameters and grammars add to a decode step of 16 sequences.

Whole engine steps, greedy and with everything on, in turn; medians of CPU time and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

from pdserve.bench.engine import CONTEXT, add, step
from pdserve.bench.result import tell
from pdserve.engine.engine import Engine
from pdserve.engine.grammar import TokenGrammar
from pdserve.grammars import Grammars
from pdserve.launch.folders import cache_folder
from pdserve.models.config import load_config
from pdserve.models.default_model import ensure_default_model
from pdserve.request import Grammar, SamplingParams
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


def step_ms(
    engine: Engine, name: str, sampling: SamplingParams, grammars: Grammars, grammar: Grammar | None, rounds: int
) -> float:
    """Median of `rounds` decode steps."""
    sequences = []
    for i in range(BATCH):
        sequence = add(engine, f"{name}/{i}", CONTEXT, 1000)
        sequence.sampling = sampling
        if grammar is not None:
            sequence.grammar = TokenGrammar(grammars.submit(grammar))
        sequences.append(sequence)
    while not all(sequence.decoding for sequence in sequences):
        step(engine)
    times = []
    for _ in range(rounds):
        began_s = time.thread_time()
        step(engine)
        times.append((time.thread_time() - began_s) * 1e3)
    for sequence in sequences:
        engine.finish(sequence)
    engine.pool.clear_cached()
    return statistics.median(times)


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
    found: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(args.repeat):
        for name, (sampling, grammar) in cases.items():
            found[name].append(step_ms(engine, f"{name} {turn}", sampling, grammars, grammar, args.rounds))
    medians = {name: statistics.median(values) for name, values in found.items()}
    result = {
        "batch": BATCH,
        "step_ms": {name: round(value, 2) for name, value in medians.items()},
        "of_greedy": {name: round(value / medians["greedy"], 3) for name, value in medians.items()},
    }
    tell(result, args.json)


if __name__ == "__main__":
    main()
