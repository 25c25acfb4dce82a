"""The timeline of one request: stages that sum to its TTFT by construction (design section 7).

The router marks the points it sees itself; workers report durations of the stages inside them. What is left between
two points of the router after the reported durations is its own stage (`deliver`, `resume`): nothing is unexplained.

    received ── tokenise ── route ── wait ── [fetch, queue, compute: prefill] ── deliver ──> first token
    first token ── [reserve, transfer, commit: hand-over] ── resume ──> second token

`wait` is in the router's queue, `queue` in the worker's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TTFT_STAGES = ("tokenise", "route", "wait", "fetch", "queue", "compute", "deliver")
HANDOFF_STAGES = ("reserve", "transfer", "commit", "resume")


@dataclass(slots=True)
class Timeline:
    """Points in seconds on the router's monotonic clock; reported durations in seconds."""

    received_s: float
    tokenised_s: float | None = None
    queued_s: float | None = None  # the router's queue took it
    dispatched_s: float | None = None
    first_token_s: float | None = None
    second_token_s: float | None = None
    last_token_s: float | None = None
    output_tokens: int = 0
    reported: dict[str, float] = field(default_factory=dict)  # fetch, queue, compute, reserve, transfer, commit
    _ttft_stages: dict[str, float] | None = field(default=None, init=False, repr=False, compare=False)

    def token(self, now_s: float, count: int = 1) -> None:
        """`count` output tokens were handed to the client at `now_s`."""
        if count <= 0:
            return
        if self.first_token_s is None:
            self.first_token_s = now_s
            if count > 1:
                self.second_token_s = now_s
        elif self.second_token_s is None:
            self.second_token_s = now_s
        self.last_token_s = now_s
        self.output_tokens += count

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.received_s

    @property
    def tpot_s(self) -> float | None:
        """Mean gap after the first token; None with fewer than two tokens."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)

    def ttft_stages(self) -> dict[str, float]:
        """Seconds by stage, summing to `ttft_s`; empty before the first token, and not to be changed.

        With the first token they are settled, and kept: the record, the log, metrics and the predictor ask for them.
        """
        if self.first_token_s is None:
            return {}
        if self._ttft_stages is None:
            self._ttft_stages = self._split_ttft(self.first_token_s)
        return self._ttft_stages

    def _split_ttft(self, first_token_s: float) -> dict[str, float]:
        tokenised = self.tokenised_s if self.tokenised_s is not None else self.received_s
        dispatched = self.dispatched_s if self.dispatched_s is not None else tokenised
        queued = self.queued_s if self.queued_s is not None else dispatched
        return {
            "tokenise": tokenised - self.received_s,
            "route": queued - tokenised,
            "wait": dispatched - queued,
            **self._split(first_token_s - dispatched, ("fetch", "queue", "compute"), "deliver"),
        }

    def handoff_stages(self) -> dict[str, float]:
        """Seconds by stage, summing to the first inter-token gap; empty before it, and if nothing was handed over."""
        if self.first_token_s is None or self.second_token_s is None or "transfer" not in self.reported:
            return {}
        gap = self.second_token_s - self.first_token_s
        return self._split(gap, ("reserve", "transfer", "commit"), "resume")

    def _split(self, total_s: float, stages: tuple[str, ...], rest: str) -> dict[str, float]:
        """Reported durations, last stage first, cut to what fits into `total_s`; the remainder goes to `rest`.

        A stage may have begun before the first point (a hand-over starts while the prompt is still computed), so only
        the part that could have delayed the second point counts.
        """
        left = total_s
        out: dict[str, float] = {}
        for stage in reversed(stages):
            # In this order `max` turns the NaN that a peer may report into 0.
            out[stage] = min(max(0.0, self.reported.get(stage, 0.0)), left)
            left -= out[stage]
        return {**{stage: out[stage] for stage in stages}, rest: left}
