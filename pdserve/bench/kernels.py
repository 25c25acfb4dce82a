"""`python -m pdserve.bench.kernels`: the kernels against torch, in the shapes of SmolLM2-135M, bfloat16, one thread.

What is compared is run in turn, round by round, and medians of this thread's CPU time are taken: on a busy machine the
wall clock shows who else was running. Layers follow each other as in a model, so neither weights nor KV come from a
cache that a real step would not find them in.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from pdserve.bench.result import tell
from pdserve.kernels import choose
from pdserve.kernels.base import AttentionKind, Batch, Kernels
from pdserve.kernels.reference import ReferenceKernels

HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 576, 1536, 30, 9, 3, 64, 49152
WIDTH = (HEADS + 2 * KV_HEADS) * DIM
BLOCK_SIZE, CONTEXT, SCALE, EPS = 16, 512, DIM**-0.5, 1e-5
ATTENTION = AttentionKind(HEADS, SCALE)
DTYPE = torch.bfloat16

Run = Callable[[], object]
Linear = Callable[[Tensor, Tensor], Tensor]


def compare(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median milliseconds of CPU time of each, taken in turn, and the ratio of the last to the first."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            began_s = time.thread_time()
            run()
            times[name].append((time.thread_time() - began_s) * 1e3)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    first, *_, last = medians
    return {f"{name}_ms": round(ms, 3) for name, ms in medians.items()} | {
        f"{last}_over_{first}": round(medians[last] / medians[first], 2)
    }


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DTYPE)


def rotations(positions: int) -> Tensor:
    """Cosines and sines, [positions, DIM]: rotating the same rows again and again must not change their size."""
    angles = torch.outer(torch.arange(positions), 1e4 ** -(torch.arange(0, DIM, 2) / DIM))
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def make_batch(sequences: int, context: int, queries: int) -> Batch:
    """Every sequence has `context` tokens, of which the last `queries` are this step's; blocks in no order."""
    blocks = -(-context // BLOCK_SIZE)
    return Batch(
        positions=torch.arange(context - queries, context).repeat(sequences).int(),
        query_start=torch.arange(0, sequences * queries + 1, queries).int(),
        context_len=torch.full((sequences,), context).int(),
        block_tables=torch.randperm(sequences * blocks).view(sequences, blocks).int(),
        max_query_len=queries,
    )


def make_pool(batch: Batch) -> Tensor:
    return random(batch.block_tables.numel(), KV_HEADS, LAYERS, 2, BLOCK_SIZE, DIM)


def folded_sdpa(qkv: Tensor, batch: Batch, pool: Tensor, layer: int) -> Tensor:
    """What torch offers: gather each sequence's K and V, fold the heads of a group into the queries, and mask."""
    out = qkv.new_empty(qkv.shape[0], HEADS * DIM)
    starts, contexts = batch.query_start.tolist(), batch.context_len.tolist()
    for s, context in enumerate(contexts):
        rows = slice(starts[s], starts[s + 1])
        queries = starts[s + 1] - starts[s]
        kv = pool[batch.block_tables[s].long(), :, layer].permute(2, 1, 0, 3, 4).reshape(2, 1, KV_HEADS, -1, DIM)
        q = qkv[rows, : HEADS * DIM].view(queries, KV_HEADS, -1, DIM).permute(1, 2, 0, 3).reshape(1, KV_HEADS, -1, DIM)
        mask = None
        if queries > 1:
            seen = torch.arange(context) <= torch.arange(context - queries, context).unsqueeze(1)
            mask = seen.repeat(HEADS // KV_HEADS, 1)
        got = functional.scaled_dot_product_attention(
            q, kv[0, :, :, :context], kv[1, :, :, :context], attn_mask=mask, scale=SCALE
        )
        out[rows] = got.view(KV_HEADS, -1, queries, DIM).permute(2, 0, 1, 3).reshape(queries, -1)
    return out


def compare_attention(kernels: Kernels, sequences: int, context: int, queries: int, rounds: int) -> dict[str, float]:
    """One layer; the layers take turns."""
    batch = make_batch(sequences, context, queries)
    pool = make_pool(batch)
    qkv = random(sequences * queries, WIDTH)
    layers = iter(range(1 << 30))
    runs: dict[str, Run] = {
        "native": lambda: kernels.attention(qkv, batch, pool, next(layers) % LAYERS, ATTENTION),
        "gather_sdpa": lambda: folded_sdpa(qkv, batch, pool, next(layers) % LAYERS),
    }
    return compare(runs, rounds * 4)


def compare_ops(kernels: Kernels, rows: int, rounds: int) -> dict[str, dict[str, float]]:
    """Every other operation beside the reference, on `rows` tokens."""
    batch = make_batch(1, rows, rows)
    pool, qkv, cos_sin = make_pool(batch), random(rows, WIDTH), rotations(CONTEXT + 1)
    x, residual, weight, gate_up = random(rows, HIDDEN), random(rows, HIDDEN), random(HIDDEN), random(rows, 2 * INTER)
    ops: dict[str, Callable[[Kernels], object]] = {
        "rms_norm": lambda k: k.rms_norm(x, weight, EPS),
        "add_rms_norm": lambda k: k.add_rms_norm(x, residual, weight, EPS),
        "silu_and_mul": lambda k: k.silu_and_mul(gate_up),
        "rope_append": lambda k: k.rope_append(qkv, cos_sin, batch, pool, 0, HEADS),
    }
    reference = ReferenceKernels()
    return {
        name: compare({"native": lambda op=op: op(kernels), "reference": lambda op=op: op(reference)}, rounds * 4)  # type: ignore[misc]
        for name, op in ops.items()
    }


class Step:
    """All matrix products, and all that is not one, of a step of the model over random weights."""

    def __init__(self, kernels: Kernels, weights: list[Tensor], head: Tensor, batch: Batch) -> None:
        self.kernels, self.weights, self.head, self.batch = kernels, weights, head, batch
        self.pool = make_pool(batch)
        self.cos_sin = rotations(CONTEXT)
        self.norm = random(HIDDEN)
        rows = len(batch.positions)
        self.sampled = len(batch.context_len)
        self.inputs = {size: random(rows, size) for size in (HIDDEN, INTER, WIDTH, 2 * INTER)}

    def products(self, linear: Linear) -> None:
        for weight in self.weights:
            linear(self.inputs[weight.shape[1]], weight)
        linear(self.inputs[HIDDEN][: self.sampled], self.head)

    def others(self) -> None:
        k, batch, x, qkv = self.kernels, self.batch, self.inputs[HIDDEN], self.inputs[WIDTH]
        residual = k.rms_norm(x, self.norm, EPS)
        for layer in range(LAYERS):
            k.rope_append(qkv, self.cos_sin, batch, self.pool, layer, HEADS)
            k.attention(qkv, batch, self.pool, layer, ATTENTION)
            k.add_rms_norm(x, residual, self.norm, EPS)
            k.silu_and_mul(self.inputs[2 * INTER])
            k.add_rms_norm(x, residual, self.norm, EPS)


def compare_step(step: Step, rounds: int) -> dict[str, float]:
    """`gemm` is bare `torch.nn.functional.linear`; the ratios are those of the whole step to it."""
    runs: dict[str, Run] = {
        "gemm": lambda: step.products(functional.linear),
        "linear": lambda: step.products(step.kernels.linear),
        "others": step.others,
    }
    result = compare(runs, rounds)
    gemm, linear, others = (result[f"{name}_ms"] for name in ("gemm", "linear", "others"))
    result["step_with_gemm_ratio"] = round((gemm + others) / gemm, 3)
    result["step_with_linear_ratio"] = round((linear + others) / gemm, 3)
    return result


def compare_steps(kernels: Kernels, rounds: int) -> dict[str, dict[str, float]]:
    shapes = ((WIDTH, HIDDEN), (HIDDEN, HEADS * DIM), (2 * INTER, HIDDEN), (HIDDEN, INTER))
    weights = [random(*shape) for _ in range(LAYERS) for shape in shapes]
    head = random(VOCAB, HIDDEN)
    batches = {f"decode_{n}": make_batch(n, CONTEXT, 1) for n in (1, 8, 16, 32)}
    batches |= {f"prefill_{n}": make_batch(1, n, n) for n in (64, 128, 256, 512)}
    return {name: compare_step(Step(kernels, weights, head, batch), rounds) for name, batch in batches.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kernels = choose("native")
    with torch.inference_mode():
        result = {
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "kernels": getattr(kernels, "features", kernels.name),
            "ops_16_tokens": compare_ops(kernels, 16, args.rounds),
            "ops_512_tokens": compare_ops(kernels, 512, args.rounds),
            "decode_attention": {
                f"batch_{n}": compare_attention(kernels, n, CONTEXT, 1, args.rounds) for n in (1, 8, 32)
            },
            "prefill_attention": {
                f"{queries}_of_{context}": compare_attention(kernels, 1, context, queries, args.rounds)
                for queries, context in ((512, 512), (512, 2560), (64, 2048), (8, 512))
            },
            "step": compare_steps(kernels, args.rounds),
        }
    tell(result, args.json)


if __name__ == "__main__":
    main()
