"""Drafts are what followed the same tokens before; right ones save steps, and no draft changes a token."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdserve.engine.prompt_lookup import NGRAM, PromptLookup
from tests.pdserve.engine.test_engine_properties import foresee
from tests.support.tiny_engine import expected_of, make_sequence, output_of, prompt, run_to_end, step, tiny_engine


@given(st.lists(st.integers(0, 3), max_size=60), st.data())
def test_draft_is_what_followed_the_latest_occurrence(tokens: list[int], data: st.DataObject) -> None:
    lookup = PromptLookup(4)
    for end in sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=4))):
        lookup.draft(tokens[:end])
    draft = lookup.draft(tokens)
    last = tokens[-NGRAM:]
    found = [i for i in range(NGRAM, len(tokens)) if len(last) == NGRAM and tokens[i - NGRAM : i] == last]
    assert draft == (tokens[found[-1] : found[-1] + 4] if found else [])


def test_length_follows_what_was_right() -> None:
    lookup, tokens = PromptLookup(8), [1, 2, 3] + [4] * 20 + [1, 2, 3]
    assert len(lookup.draft(tokens)) == 8
    lookup.learn(8, 0)
    assert len(lookup.draft(tokens)) == 1
    lookup.learn(1, 1)
    assert len(lookup.draft(tokens)) == 3
    lookup.learn(3, 3)
    assert len(lookup.draft(tokens)) == 7


def test_right_drafts_save_steps() -> None:
    engine = tiny_engine(speculate=4)
    sequence = make_sequence("s", prompt(0, 8), max_tokens=20)
    foresee(sequence, engine, wrong_every=1000)
    engine.scheduler.add(sequence)
    steps = 0
    while not engine.idle:
        step(engine)
        steps += 1
    assert output_of(sequence) == expected_of(sequence, engine)
    assert steps <= 1 + 4 + 1  # the prompt, then five tokens a step
    assert engine.num_accepted == engine.num_drafted >= 15


def test_repeated_text_is_drafted() -> None:
    """The model continues as it likes; that its prompt repeats itself is enough for drafts."""
    engine = tiny_engine(speculate=3)
    sequence = make_sequence("s", [1, 2, 3, 4] * 4, max_tokens=8)
    engine.scheduler.add(sequence)
    run_to_end(engine)
    assert output_of(sequence) == expected_of(sequence, engine)
