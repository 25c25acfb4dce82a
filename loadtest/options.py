"""The options that shape a workload, for the sweep and for locust alike."""

from __future__ import annotations

import argparse
from pathlib import Path

from loadtest.replay import Replay
from loadtest.workload import Chat, ShareGpt, Synthetic, Workload
from pdserve.trace import read_trace

KINDS = ("synthetic", "sharegpt", "chat", "replay")


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """locust's parser is one of argparse's too."""
    parser.add_argument("--prompt-tokens", type=int, default=512, help="synthetic: of every prompt")
    parser.add_argument("--output-tokens", type=int, default=64, help="synthetic and chat: of every answer")
    parser.add_argument("--shared-tokens", type=int, default=0, help="synthetic: head that all prompts share")
    parser.add_argument("--cv", type=float, default=1.0, help="synthetic: 1 is Poisson, 2-4 comes in bursts")
    parser.add_argument("--turns", type=int, default=3, help="chat: of every conversation")
    parser.add_argument("--trace", type=Path, help="replay: a Mooncake or Azure trace")
    parser.add_argument("--trace-rows", type=int, default=500, help="replay: the first rows, over and over")
    parser.add_argument("--length-scale", type=float, default=0.05, help="replay: factor of all lengths")
    parser.add_argument("--max-prompt-tokens", type=int, default=1536, help="replay: what is longer then is cut")
    parser.add_argument("--max-output-tokens", type=int, default=256, help="replay: what is longer then is cut")


def workload_of(kind: str, args: argparse.Namespace) -> Workload:
    """Of one of `KINDS`. Raises ValueError or OSError."""
    if kind == "chat":
        return Chat(turns=args.turns, output_tokens=args.output_tokens)
    if kind == "sharegpt":
        return ShareGpt()
    if kind == "synthetic":
        return Synthetic(args.prompt_tokens, args.output_tokens, args.cv, args.shared_tokens)
    if args.trace is None:
        raise ValueError("a replay needs --trace")
    trace = read_trace(args.trace, args.trace_rows)
    return Replay(trace, args.length_scale, args.max_prompt_tokens, args.max_output_tokens)
