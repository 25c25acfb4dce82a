"""`python -m pdserve.bench.speculation`: decode with and without prompt look-up, on prompts that invite repetition and
one that does not. Whole engine steps of one sequence, greedy, in turn; CPU time a token, and drafts that were right.
"""

from __future__ import annotations

import argparse
import statistics
import time
from array import array
from pathlib import Path

import tokenizers

from kvstore.keys import root_key
from pdserve.bench.result import tell
from pdserve.engine.engine import Engine
from pdserve.engine.sequence import Sequence
from pdserve.launch.folders import cache_folder
from pdserve.models.default_model import ensure_default_model
from pdserve.request import SamplingParams
from pdserve.worker.build import build_engine
from pdserve.worker.config import Role, WorkerConfig

TOKENS = 96
CODE = """def area(width, height):
    return width * height

def volume(width, height, depth):
    return area(width, height) * depth

def surface(width, height, depth):
    return 2 * (area(width, height) + area(width, depth) + area(height, depth))
"""
TEXT = (
    "The river rises in the northern hills and runs south for two hundred miles. It passes three towns, each of which "
    "was founded around a mill. The largest of those towns has a bridge that was built in 1821. The bridge which was "
    "built in 1821 still carries the road to the coast. Every spring the river floods the low meadows below the town."
)
PROMPTS = {
    "code editing": f"Rename width to w everywhere. Before:\n```python\n{CODE}```\nAfter:\n```python\n",
    "summarising": f"Text: {TEXT}\nRepeat the main sentences.\nSummary: The river rises in the northern hills",
    "free text": "Once upon a time there was a clockmaker who",
}


def generate(engine: Engine, prompt: list[int], name: str) -> tuple[list[int], float]:
    """Output tokens, and CPU milliseconds of a decode step for each of them."""
    sequence = Sequence(
        name=name,
        token_ids=array("I", prompt),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(max_tokens=TOKENS, seed=0, temperature=0.0),
        root_key=root_key(name.encode()),
        block_size=engine.config.block_size,
        arrived_s=0.0,
    )
    engine.scheduler.add(sequence)
    while not sequence.decoding:
        engine.execute(engine.schedule(0.0), 0.0)
    began_s = time.thread_time()
    while not engine.idle:
        engine.execute(engine.schedule(0.0), 0.0)
    took_ms = (time.thread_time() - began_s) * 1e3
    engine.pool.clear_cached()
    return sequence.output.tolist(), took_ms / (sequence.num_output_tokens - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft", type=int, default=6, help="tokens")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = ensure_default_model(cache_folder(), lambda text, share: None)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    engines = [
        build_engine(
            WorkerConfig(
                role=Role.MIXED,
                worker_id="bench",
                model=folder,
                kv_bytes=1 << 28,
                max_model_len=2048,
                speculate_tokens=draft,
            ),
            lambda text: None,
        ).engine
        for draft in (0, args.draft)
    ]
    result: dict[str, object] = {"draft_tokens": args.draft, "output_tokens": TOKENS}
    for name, text in PROMPTS.items():
        prompt = tokenizer.encode(text).ids
        took: tuple[list[float], list[float]] = ([], [])
        outputs: list[list[int]] = [[], []]
        drafted, accepted = engines[1].num_drafted, engines[1].num_accepted
        for turn in range(args.repeat):
            for i, engine in enumerate(engines):
                outputs[i], token_ms = generate(engine, prompt, f"{name} {turn}")
                took[i].append(token_ms)
        plain_ms, looked_up_ms = (statistics.median(values) for values in took)
        drafted, accepted = engines[1].num_drafted - drafted, engines[1].num_accepted - accepted
        result[name] = {
            "token_ms": {"plain": round(plain_ms, 2), "looked_up": round(looked_up_ms, 2)},
            "speed_up": round(plain_ms / looked_up_ms, 2),
            "accepted": f"{accepted} of {drafted}",
            # bf16 rounds a batch of rows otherwise than one row: a near tie may fall the other way.
            "same_tokens": outputs[0] == outputs[1],
        }
    tell(result, args.json)


if __name__ == "__main__":
    main()
