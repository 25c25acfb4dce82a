"""Whatever is asked, in any order, in however small a pool: every stream is the undisturbed one, and nothing is left.

The oracle model (tests/support) makes a wrong block visible as a wrong token; invariants I1, I2, I3 and I7.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import NoRoom, StaleBlock
from kvstore.keys import block_keys, root_key
from kvstore.pool import BlockRef
from pdserve.engine.engine import Engine
from pdserve.engine.prompt_lookup import PromptLookup
from pdserve.engine.sequence import Sequence, Status
from pdserve.request import SamplingParams
from tests.support.hash_grammar import HashGrammar
from tests.support.tiny_engine import (
    BLOCK_SIZE,
    ROOT,
    assert_idle,
    expected_of,
    make_sequence,
    output_of,
    step,
    tiny_engine,
)

NOW_S = 0.0


@dataclass(frozen=True)
class Ask:
    """A request of a random mix; steps count from 0."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    arrives: int
    aborts: int | None
    tenant: int
    num_delivered: int  # output tokens of an earlier attempt on another worker
    grammar: int | None  # its seed


@st.composite
def asks(draw: st.DrawFn, max_len: int) -> Ask:
    """Prompts are prefixes of few texts plus a tail of their own, so they share blocks."""
    text = draw(st.integers(0, 2))
    shared = draw(st.integers(0, max_len))
    tail = draw(st.lists(st.integers(0, 60), max_size=6))
    prompt = (*((text * 20 + i * i) % 61 for i in range(shared)), *tail)[: max_len - 1] or (text,)
    sampling = SamplingParams(
        max_tokens=draw(st.integers(1, 12)),
        seed=draw(st.integers(0, 3)),
        temperature=draw(st.sampled_from((0.0, 1.0))),
        top_p=draw(st.sampled_from((1.0, 0.9))),
        min_p=draw(st.sampled_from((0.0, 0.1))),
        frequency_penalty=draw(st.sampled_from((0.0, 1.0))),
        repetition_penalty=draw(st.sampled_from((1.0, 1.2))),
        logprobs=draw(st.sampled_from((None, 1))),
        prompt_logprobs=draw(st.sampled_from((None, None, 0))),
        min_tokens=draw(st.integers(0, 3)),
        stop_token_ids=draw(st.sampled_from(((), (1, 2, 3), tuple(range(12))))),
    )
    aborts = draw(st.none() | st.integers(0, 30))
    delivered = draw(st.sampled_from((0, 0, 0, 2)))
    grammar = draw(st.sampled_from((None, None, 1, 2)))
    return Ask(prompt, sampling, draw(st.integers(0, 20)), aborts, draw(st.sampled_from((0, 0, 1))), delivered, grammar)


def to_sequence(ask: Ask, name: str, engine: Engine, *, prefill_only: bool = False) -> Sequence:
    root = ROOT if ask.tenant == 0 else root_key(b"other tenant")

    def made(output: Tokens[int]) -> Sequence:
        return make_sequence(
            name,
            ask.prompt,
            output=output,
            sampling=ask.sampling,
            root=root,
            prefill_only=prefill_only,
            grammar=None if ask.grammar is None else HashGrammar(ask.grammar),
        )

    return made(expected_of(made([]), engine)[:-1][: ask.num_delivered])


def foresee(sequence: Sequence, engine: Engine, wrong_every: int) -> None:
    """Drafts that are right, but for each `wrong_every`th token: look-up would find too little in random tokens."""
    future = [*sequence.token_ids[: sequence.num_prompt_tokens], *expected_of(sequence, engine)]

    class Foresight(PromptLookup):
        def draft(self, tokens: Tokens[int]) -> list[int]:
            right = future[len(tokens) : len(tokens) + 4]
            return [
                (token + 1) % 50 if (len(tokens) + i) % wrong_every == 0 else token for i, token in enumerate(right)
            ]

    sequence.lookup = Foresight(4)


def work_of(mix: list[Ask]) -> int:
    """Tokens to compute if nothing is preempted."""
    return sum(len(ask.prompt) + ask.sampling.max_tokens for ask in mix)


def check_visible(engine: Engine, sequences: list[Sequence]) -> None:
    """What can be found was computed by a sequence (I7), and a child is never found without its parent."""
    parents = {}
    for s in sequences:
        keys = block_keys(s.root_key, s.token_ids, BLOCK_SIZE)
        parents.update(zip(keys, [None, *keys], strict=False))
    visible = engine.pool.visible_keys()
    assert len(set(visible)) == len(visible)
    assert set(visible) <= set(parents)
    assert all(parents[key] is None or parents[key] in visible for key in visible)


@settings(max_examples=250)
@given(data=st.data())
def test_every_stream_is_undisturbed_and_every_block_comes_back(data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(2, 20), "blocks")
    sequences_limit = data.draw(st.integers(1, 6), "sequences")
    budget = sequences_limit + data.draw(st.integers(0, 24), "budget beyond one token each")
    speculate = data.draw(st.sampled_from((0, 0, 1, 4)), "tokens of a draft")
    engine = tiny_engine(num_blocks, tokens=budget, sequences=sequences_limit, speculate=speculate)
    mix = data.draw(st.lists(asks(engine.config.max_model_len - 2), min_size=1, max_size=8), "mix")
    sequences = [to_sequence(ask, f"s{i}", engine) for i, ask in enumerate(mix)]
    for sequence in sequences if speculate else ():
        foresee(sequence, engine, wrong_every=data.draw(st.integers(1, 5), "a wrong token in so many"))
    aborted: set[Sequence] = set()
    for now in range(100 + 4 * work_of(mix)):
        for ask, sequence in zip(mix, sequences, strict=True):
            if ask.arrives == now:
                engine.scheduler.add(sequence)
            if ask.aborts is not None and ask.aborts == now >= ask.arrives and sequence.status is not Status.FINISHED:
                aborted.add(sequence)
                assert engine.finish(sequence) == []
        _, tokens = step(engine)
        assert all(token.sequence not in aborted for token in tokens)
        check_visible(engine, sequences)
        if engine.idle and now > 20:
            break
    assert_idle(engine)
    for sequence in sequences:
        expected = expected_of(sequence, engine)
        assert output_of(sequence) == (expected[: sequence.num_output_tokens] if sequence in aborted else expected)


@settings(max_examples=100)
@given(mix=st.lists(asks(60), min_size=1, max_size=6))
def test_cached_tokens_are_the_longest_prefix_computed_before(mix: list[Ask]) -> None:
    """One after the other in a pool where nothing is evicted: the hit is what earlier ones have left behind."""
    engine = tiny_engine(512, tokens=64, max_model_len=80)
    left: set[bytes] = set()
    for i, ask in enumerate(mix):
        sequence = to_sequence(ask, f"s{i}", engine)
        keys = block_keys(sequence.root_key, sequence.token_ids, BLOCK_SIZE)
        usable = keys[: (len(sequence) - 1) // BLOCK_SIZE]
        hit = next((n for n, key in enumerate(usable) if key not in left), len(usable)) * BLOCK_SIZE
        hit *= not sequence.tells_prompt_logprobs  # which takes nothing from the cache
        engine.scheduler.add(sequence)
        while not engine.idle:
            step(engine)
        assert sequence.cached_tokens == min(hit, sequence.num_prompt_tokens)
        # The last token sampled has no KV.
        left.update(block_keys(sequence.root_key, sequence.token_ids[:-1], BLOCK_SIZE))
        assert set(engine.pool.visible_keys()) == left
    assert_idle(engine)


@dataclass
class Pair:
    """A prefill and a decode engine, and the wire between them, on which one request moves at a time."""

    prefill: Engine
    decode: Engine
    rng: random.Random
    to_reserve: list[tuple[Sequence, Sequence]] = field(default_factory=list)
    landing: list[tuple[Sequence, Sequence, list[BlockRef]]] = field(default_factory=list)
    quarantined: list[BlockRef] = field(default_factory=list)

    def reserve(self) -> None:
        """The oldest handed-over prompt asks for room."""
        source, target = self.to_reserve[0]
        if target.status is Status.FINISHED:
            self.to_reserve.pop(0)
            return
        before = self.decode.pool.ledger(NOW_S)
        try:
            held = self.decode.scheduler.reserve(target, NOW_S, 1.0)
        except NoRoom:
            assert self.decode.pool.ledger(NOW_S) == before
            assert not target.blocks
            return
        self.to_reserve.pop(0)
        missing = target.blocks[held:]
        self.decode.pool.receive(missing)
        self.landing.append((source, target, missing))

    def land(self) -> None:
        """All missing blocks of one arriving sequence are copied and verified, unless it has been aborted."""
        source, target, missing = self.landing.pop(self.rng.randrange(len(self.landing)))
        if target.status is Status.FINISHED:
            return
        first = len(target.blocks) - len(missing)
        for ref, block in zip(missing, source.block_ids[first:], strict=True):
            self.decode.runner.pool[ref.block_id] = self.prefill.runner.pool[block]
            self.decode.pool.land(ref)
        self.decode.scheduler.arrived(target, [source.token_ids[-1]])
        self.prefill.finish(source)

    def abort(self, source: Sequence, target: Sequence) -> None:
        self.prefill.finish(source)
        self.quarantined += self.decode.finish(target)

    def late_write(self) -> None:
        """A write that was under way when its request was aborted: it lands in quarantine, and harms nobody."""
        for ref in self.quarantined:
            self.decode.runner.pool[ref.block_id] = self.rng.random()
        for _ in range(self.rng.randrange(len(self.quarantined)) + 1):
            ref = self.quarantined.pop()
            self.decode.pool.drained(ref)
            for late in (self.decode.pool.land, self.decode.pool.drained):
                try:
                    late(ref)
                except StaleBlock:
                    continue
                raise AssertionError("a stale reference was accepted")


@settings(max_examples=200)
@given(data=st.data())
def test_sequences_handed_over_between_two_engines_go_on_undisturbed(data: st.DataObject) -> None:
    length, blocks = 40, st.integers(10, 20)
    budget, places = data.draw(st.integers(4, 30), "budget"), data.draw(st.integers(1, 4), "places on decode")
    prefill = tiny_engine(data.draw(blocks), tokens=budget, sequences=4, max_model_len=length)
    decode = tiny_engine(data.draw(blocks), tokens=12, sequences=places, max_model_len=length)
    pair = Pair(prefill, decode, data.draw(st.randoms(use_true_random=False)))
    mix = data.draw(st.lists(asks(length - 4), min_size=1, max_size=6), "mix")
    halves = []
    for i, ask in enumerate(mix):
        # Every third is a whole request of the decode worker, beside the sequences that arrive there.
        source = to_sequence(ask, f"s{i}", prefill, prefill_only=i % 3 != 2)
        halves.append((source, to_sequence(ask, f"s{i}", decode)))
    aborted: set[Sequence] = set()
    for now in range(200 + 10 * work_of(mix)):
        for ask, (source, target) in zip(mix, halves, strict=True):
            if ask.arrives == now:
                (prefill if source.prefill_only else decode).scheduler.add(source if source.prefill_only else target)
            if ask.aborts == now >= ask.arrives:
                aborted.add(target)
                pair.abort(source, target)
        for token in step(prefill)[1]:
            target = next(t for s, t in halves if s is token.sequence)
            if token.finish_reason is None:
                pair.to_reserve.append((token.sequence, target))
            else:
                target.token_ids.append(token.token_id)
                prefill.finish(token.sequence)
        for _ in range(pair.rng.randrange(3)):
            if pair.to_reserve:
                pair.reserve()
            if pair.landing and pair.rng.random() < 0.6:
                pair.land()
        step(decode)
        if pair.quarantined and pair.rng.random() < 0.3:
            pair.late_write()
        waiting = pair.to_reserve or pair.landing or pair.quarantined
        if now > 30 and prefill.idle and decode.idle and not waiting:
            break
    assert_idle(prefill)
    assert_idle(decode)
    for source, target in halves:
        expected = expected_of(target, decode)
        assert output_of(target) == (expected[: target.num_output_tokens] if target in aborted else expected)
        assert output_of(source) == expected[: source.num_output_tokens]
