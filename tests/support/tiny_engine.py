"""Engines of a few small blocks around the oracle model, and how a test drives them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Tokens

from kvstore.keys import BlockKey, root_key
from kvstore.layout import BlockGeometry
from kvstore.pool import BlockPool
from pdserve.engine.config import EngineConfig
from pdserve.engine.engine import Engine, StepToken
from pdserve.engine.runner import Runner
from pdserve.engine.scheduler import Plan
from pdserve.engine.sequence import Grammar, Sequence
from pdserve.engine.torch_sampler import TorchSampler
from pdserve.request import SamplingParams
from tests.support.hash_grammar import HashGrammar
from tests.support.oracle_model import OracleModel, empty_pool, undisturbed

BLOCK_SIZE = 4
GEOMETRY = BlockGeometry(BLOCK_SIZE, num_layers=2, num_kv_heads=2, head_dim=2, dtype="bfloat16")
ROOT = root_key(GEOMETRY.fingerprint("oracle"))


def tiny_engine(
    num_blocks: int = 16, *, tokens: int = 16, sequences: int = 8, max_model_len: int = 0, speculate: int = 0
) -> Engine:
    """`tokens` and `sequences` bound a step; a request may fill the pool unless `max_model_len` says less."""
    config = EngineConfig(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_batched_tokens=tokens,
        max_sequences=sequences,
        max_model_len=max_model_len or num_blocks * BLOCK_SIZE,
        speculate_tokens=speculate,
    )
    runner = Runner(OracleModel(), empty_pool(GEOMETRY, num_blocks), TorchSampler())
    return Engine(config, BlockPool(num_blocks, BLOCK_SIZE), runner)


def make_sequence(
    name: str,
    prompt: Tokens[int],
    max_tokens: int = 4,
    *,
    output: Tokens[int] = (),
    root: BlockKey = ROOT,
    prefill_only: bool = False,
    sampling: SamplingParams | None = None,
    grammar: Grammar | None = None,
) -> Sequence:
    """Greedy unless `sampling` says otherwise; `output` is what a resumed request has delivered already."""
    return Sequence(
        name=name,
        token_ids=array("I", [*prompt, *output]),
        num_prompt_tokens=len(prompt),
        sampling=sampling or SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0),
        root_key=root,
        block_size=BLOCK_SIZE,
        arrived_s=0.0,
        prefill_only=prefill_only,
        grammar=grammar,
    )


def prompt(first: int, length: int) -> list[int]:
    return [(first + i) % 50 for i in range(length)]


def add(engine: Engine, *sequences: Sequence) -> None:
    for sequence in sequences:
        engine.scheduler.add(sequence)


def output_of(sequence: Sequence) -> list[int]:
    return sequence.token_ids[sequence.num_prompt_tokens :].tolist()


def expected_of(sequence: Sequence, engine: Engine) -> list[int]:
    """The undisturbed output of the sequence's request, from its prompt alone."""
    prompt = sequence.token_ids[: sequence.num_prompt_tokens].tolist()
    grammar = sequence.grammar.again() if isinstance(sequence.grammar, HashGrammar) else None
    return undisturbed(prompt, sequence.sampling, GEOMETRY, max_model_len=engine.config.max_model_len, grammar=grammar)


def step(engine: Engine, now_s: float = 0.0) -> tuple[Plan, list[StepToken]]:
    """One step, with the invariants that hold after each. The plan is empty only if somebody else holds the blocks."""
    decoding = [sequence for sequence in engine.scheduler.running if sequence.decoding]
    preempted = engine.scheduler.num_preempted
    plan = engine.schedule(now_s)
    check_plan(engine, plan)
    if plan.chunks and engine.scheduler.num_preempted == preempted:
        assert [chunk.sequence for chunk in plan.chunks[: len(decoding)]] == decoding, "decodes come first"
    tokens = engine.execute(plan, now_s) if plan.chunks else []
    ledger = engine.pool.ledger(now_s)
    assert ledger.sums, ledger
    others = engine.scheduler.arriving or ledger.sending or ledger.quarantined
    assert plan.chunks or engine.idle or others, "nothing to do, though sequences wait"
    return plan, tokens


def check_plan(engine: Engine, plan: Plan) -> None:
    """Budget, every sequence once, and room for every token."""
    assert plan.num_tokens <= engine.config.max_batched_tokens
    assert len({chunk.sequence.name for chunk in plan.chunks}) == len(plan.chunks)
    assert len(engine.scheduler.running) + len(engine.scheduler.arriving) <= engine.config.max_sequences
    for chunk in plan.chunks:
        assert chunk.num_tokens > 0
        assert chunk.sequence in engine.scheduler.running
        assert chunk.sequence.num_computed + chunk.num_tokens <= len(chunk.sequence.blocks) * BLOCK_SIZE


def chunks(engine: Engine) -> dict[str, int]:
    """Run one step; tokens computed by sequence."""
    plan, _ = step(engine)
    return {chunk.sequence.name: chunk.num_tokens for chunk in plan.chunks}


def run_to_end(engine: Engine, max_steps: int = 500) -> list[StepToken]:
    """All tokens until no step could advance anything."""
    tokens: list[StepToken] = []
    for _ in range(max_steps):
        if engine.idle:
            return tokens
        tokens += step(engine)[1]
    raise AssertionError(f"still not idle after {max_steps} steps")


def assert_idle(engine: Engine) -> None:
    """Nothing is left of any sequence: only free and cached blocks, every queue empty."""
    ledger = engine.pool.ledger(0.0)
    assert ledger.idle, ledger
    assert not ledger.holds
    assert not engine.scheduler.waiting
    assert not engine.scheduler.busy
