"""Whether a request is better run on a decode worker alone than handed over to it from a prefill worker.

Disaggregation keeps prompts out of the steps of those who decode. What is left to compute of a prompt may be so
little, behind a prefix that the decode worker holds, that keeping it out costs more than letting it in.
"""

from __future__ import annotations

from router.policy.decision import Considered


def skips_handoff(elsewhere: Considered, here: Considered, handoff_s: float) -> bool:
    """
    Args:
        elsewhere: the prefill worker that was chosen for the prompt.
        here: the decode worker that was chosen for all of it; its term `stall`: what its sequences would wait in sum.
        handoff_s: what a hand-over adds to a request's first gap between tokens, as measured.

    Nobody is ever held up for longer than a hand-over takes: that is the threshold on the prompt's length, and it
    follows from measured speed. Below it, what the others wait in sum must be less than what this request gains.
    """
    gained_s = handoff_s + _until_first_token_s(elsewhere) - _until_first_token_s(here)
    return here.uncached_s <= handoff_s and here.terms["stall"] < gained_s


def _until_first_token_s(worker: Considered) -> float:
    return worker.queued_s + worker.fetch_s + worker.uncached_s
