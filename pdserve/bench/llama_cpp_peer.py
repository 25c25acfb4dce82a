"""`PYTHON pdserve/bench/llama_cpp_peer.py FILE ROUNDS`: a prompt and decode steps with llama-cpp-python, one thread.

Run by `pdserve.bench.engine` in the Python of another environment, which has that package and none of ours.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from importlib import import_module
from typing import Any

CONTEXT = 512


def main(file: str, rounds: int) -> None:
    llama_cpp = import_module("llama_cpp")
    model = llama_cpp.Llama(
        file, n_ctx=2 * CONTEXT, n_batch=CONTEXT, n_ubatch=CONTEXT, n_threads=1, n_threads_batch=1, verbose=False
    )
    tokens = [100 + 7919 * i % 40_000 for i in range(CONTEXT)]
    prefill_ms = []
    for _ in range(4):
        model.reset()
        prefill_ms.append(cpu_ms(model, tokens))
    decode_ms = [cpu_ms(model, [100 + i]) for i in range(rounds)]
    result = {
        "version": llama_cpp.__version__,
        "decode_ms": round(statistics.median(decode_ms[1:]), 2),
        "prefill_512_ms": round(statistics.median(prefill_ms[1:]), 2),
    }
    print(json.dumps(result))


def cpu_ms(model: Any, tokens: list[int]) -> float:
    began_s = time.process_time()
    model.eval(tokens)
    return (time.process_time() - began_s) * 1e3


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
