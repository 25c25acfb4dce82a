"""`python -m pdserve.bench.engine`: a whole engine step against the bare weight GEMMs of its shapes, on one thread.

The engine is the real one: scheduler, batch building, model, sampling. The GEMMs are `torch.nn.functional.linear` with
the model's own weights and nothing else. The two alternate, and medians of CPU time are compared: small machines are
noisy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from kvstore.keys import root_key
from pdserve.bench.result import tell
from pdserve.engine.engine import Engine
from pdserve.engine.sequence import Sequence
from pdserve.errors import ConfigError
from pdserve.kernels.base import Weight
from pdserve.kernels.quantised import QuantisedWeight
from pdserve.launch.folders import cache_folder
from pdserve.models.config import load_config
from pdserve.models.default_model import ensure_default_model
from pdserve.models.folder import weight_files
from pdserve.models.source import resolve_model
from pdserve.models.weight_format import WEIGHT_FORMATS
from pdserve.models.weights import Weights, open_weights
from pdserve.request import SamplingParams
from pdserve.worker.build import build_engine
from pdserve.worker.config import Role, WorkerConfig

CONTEXT = 512


def dense(weight: Weight | None) -> Tensor:
    """Of the serving dtype, as the products that a step is compared with read it."""
    assert weight is not None, "this benchmark is of models without experts"
    return weight.values().bfloat16() if isinstance(weight, QuantisedWeight) else weight


def gemms(weights: Weights, rows: int, head_rows: int) -> Callable[[], None]:
    """All matrix products of a step over `rows` tokens of which `head_rows` are sampled from."""
    layers = [[dense(weight) for weight in (x.qkv, x.output, x.gate_up, x.down)] for x in weights.layers]
    head = dense(weights.head)
    x, attended, _, inner = (torch.randn(rows, weight.shape[1]).to(head.dtype) for weight in layers[0])

    @torch.inference_mode()
    def run() -> None:
        for qkv, output, gate_up, down in layers:
            linear(x, qkv)
            linear(attended, output)
            linear(x, gate_up)
            linear(inner, down)
        linear(x[:head_rows], head)

    return run


def add(engine: Engine, name: str, num_tokens: int, max_tokens: int) -> Sequence:
    """A sequence of random tokens; the salt keeps prompts from sharing a prefix."""
    generator = torch.Generator().manual_seed(hash(name) & 0xFFFF)
    sequence = Sequence(
        name=name,
        token_ids=array("I", torch.randint(100, 40_000, (num_tokens,), generator=generator).tolist()),
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0),
        root_key=root_key(name.encode()),
        block_size=engine.config.block_size,
        arrived_s=0.0,
    )
    engine.scheduler.add(sequence)
    return sequence


def step(engine: Engine) -> None:
    engine.execute(engine.schedule(0.0), 0.0)


def alternate(subject: Callable[[], None], baseline: Callable[[], None], rounds: int) -> dict[str, float]:
    """Medians in milliseconds of both, taken in turn, and their ratio."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, into in zip((subject, baseline), times, strict=True):
            began_s = time.thread_time()
            function()
            into.append((time.thread_time() - began_s) * 1e3)
    step_ms, gemm_ms = (statistics.median(values[1:]) for values in times)
    return {"step_ms": round(step_ms, 2), "gemm_ms": round(gemm_ms, 2), "ratio": round(step_ms / gemm_ms, 3)}


def decode(engine: Engine, weights: Weights, batch: int, rounds: int) -> dict[str, float]:
    sequences = [add(engine, f"decode {batch}/{i}", CONTEXT, rounds + 16) for i in range(batch)]
    while not all(sequence.decoding for sequence in sequences):
        step(engine)
    result = alternate(lambda: step(engine), gemms(weights, batch, batch), rounds)
    for sequence in sequences:
        engine.finish(sequence)
    engine.pool.clear_cached()
    return result


def prefill(engine: Engine, weights: Weights, num_tokens: int, rounds: int) -> dict[str, float]:
    names = iter(range(rounds))

    def run() -> None:
        add(engine, f"prefill {next(names)}", num_tokens, 1)
        step(engine)

    return alternate(run, gemms(weights, num_tokens, 1), rounds)


def llama_cpp(python: str, folder: Path, rounds: int) -> dict[str, object]:
    """The same steps by llama-cpp-python, in the environment of the interpreter `python`; a crash there is told."""
    files = weight_files(folder)
    if files[0].suffix != ".gguf":
        raise ConfigError(f"llama-cpp-python needs a GGUF file, and {folder} has none.")
    command = (python, str(Path(__file__).with_name("llama_cpp_peer.py")), str(files[0]), str(rounds))
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": f"exit status {done.returncode}"}
    result: dict[str, object] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: the default model")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--weights", choices=WEIGHT_FORMATS, default="dense")
    parser.add_argument("--llama-cpp", help="a Python that has llama-cpp-python, to run the same GGUF file beside")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cache = cache_folder()
    folder = resolve_model(args.model, cache) if args.model else ensure_default_model(cache, lambda text, share: None)
    config = WorkerConfig(
        role=Role.MIXED,
        worker_id="bench",
        model=folder,
        kv_bytes=1 << 30,
        max_model_len=4096,
        kernels=args.kernels,
        weights=args.weights,
    )
    engine = build_engine(config, lambda text: None).engine
    weights = open_weights(folder, load_config(folder), config.dtype, cache, config.weights)
    result: dict[str, object] = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "context_tokens": CONTEXT,
    }
    for batch in (1, 8, 16):
        result[f"decode_batch_{batch}"] = decode(engine, weights, batch, args.rounds)
    result["prefill_512"] = prefill(engine, weights, 512, args.rounds)
    if args.llama_cpp is not None:
        result["llama_cpp"] = llama_cpp(args.llama_cpp, folder, args.rounds)
    tell(result, args.json)


if __name__ == "__main__":
    main()
