"""What the client saw of one request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pdserve.slo import Slo, is_good


@dataclass(frozen=True, slots=True)
class ServerTimes:
    """The server's own account (`x_pdserve` in the last chunk), in seconds."""

    stages: Mapping[str, float]  # sum to its TTFT
    handoff: Mapping[str, float]  # sum to the first gap; empty if nothing was handed over


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    Attributes:
        status: of the HTTP response; 0 if there was none.
        error: empty if the stream came to its end.
        ttft_s: from sending to the first chunk with text; None if none came.
        tpot_s: mean time per token after the first; None with fewer than two tokens.
        gaps_s: between chunks with text.
        e2e_s: from sending to the last chunk with text, or to the failure.
        late_s: how long after its due time the client sent it: what the client itself could not keep up with.
    """

    status: int
    error: str
    ttft_s: float | None
    tpot_s: float | None
    gaps_s: tuple[float, ...]
    e2e_s: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    text: str = field(default="", repr=False)
    server: ServerTimes | None = None
    late_s: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status == 200 and not self.error and self.ttft_s is not None

    def meets_ttft(self, slo: Slo) -> bool:
        return self.ok and slo.meets_ttft(self.ttft_s)

    def meets_tpot(self, slo: Slo) -> bool:
        return self.ok and slo.meets_tpot(self.tpot_s)

    def good(self, slo: Slo) -> bool:
        return self.ok and is_good(slo, self.ttft_s, self.tpot_s)
