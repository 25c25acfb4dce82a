"""On a skewed trace copies of the hot prefix keep requests good that would queue behind its holder."""

from __future__ import annotations

import json
import random
from pathlib import Path

from pdserve.slo import Slo
from pdserve.trace import read_trace
from router.policy import POLICIES, Speed
from router.replay.outcome import Outcome
from router.replay.run import replay_all
from router.replay.setting import Setting, arrivals

TOKEN_BYTES = 100_000


def skewed(path: Path) -> Path:
    """Mooncake's form: four of five requests begin with the same 16,384 tokens, at a rate that rises to 24 a second."""
    draw = random.Random(3)
    at_s, lines, fresh = 0.0, [], 10_000
    while at_s < 240.0:
        at_s += draw.expovariate(4 + 20 * min(1.0, at_s / 120.0))
        if draw.random() < 0.8:
            blocks, tail = list(range(32)), draw.choice([256, 512])
        else:
            blocks, tail = [100 + 40 * draw.randrange(40) + n for n in range(8)], 512
        row = {"timestamp": int(1000 * at_s), "input_length": 512 * len(blocks) + tail}
        lines.append(json.dumps(row | {"output_length": draw.randrange(8, 64), "hash_ids": [*blocks, fresh]}))
        fresh += 1
    path.write_text("\n".join(lines))
    return path


def outcome(path: Path, token_bytes: int) -> Outcome:
    trace = read_trace(path)
    speed = Speed(prefill_tokens_per_s=((1, 8_000.0),))
    setting = Setting(8, trace.block_tokens, 400_000, speed, Slo(4.0, 0.25), token_bytes=token_bytes)
    [found] = replay_all([POLICIES["cost"]], setting, arrivals(trace))
    return found


def test_copies_keep_a_hot_prefix_from_holding_up_its_worker(tmp_path: Path) -> None:
    path = skewed(tmp_path / "skewed.jsonl")
    without, copied = outcome(path, 0), outcome(path, TOKEN_BYTES)
    assert without.copied_bytes == 0
    # Seven workers more may get the prefix, one every ten seconds; what is evicted may come again.
    assert 1 * 16_384 * TOKEN_BYTES <= copied.copied_bytes <= 14 * 16_384 * TOKEN_BYTES
    assert copied.goodput_rps > 1.3 * without.goodput_rps
    assert copied.ttft_p99_s < without.ttft_p99_s / 2
    assert copied.imbalance < without.imbalance
