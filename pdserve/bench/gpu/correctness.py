"""Parts that must pass before a figure is worth anything. Each returns what it found, and raises Wrong."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import replace

import torch
from torch import Tensor

from kvstore.keys import root_key
from pdserve.bench.gpu.drive import Setup, add, elapsed_s, finish_all, random_prompt, run_to_end, step
from pdserve.engine.device_runner import Mover
from pdserve.engine.device_sampler import RowParams, choose_tokens, chooser, columns
from pdserve.engine.runner import build_batch
from pdserve.engine.sampler import SamplingRow
from pdserve.engine.scheduler import Chunk
from pdserve.engine.sequence import Sequence, Status
from pdserve.kernels import choose
from pdserve.kernels.base import AttentionKind, Kernels
from pdserve.kernels.flashinfer import FlashInferKernels
from pdserve.kernels.reference import ReferenceKernels
from pdserve.kernels.scattered import scattered_batch
from pdserve.kernels.sdpa import SdpaKernels
from pdserve.launch.folders import cache_folder
from pdserve.models.decoder import Decoder
from pdserve.models.default_model import NAME, is_whole
from pdserve.request import SamplingParams
from pdserve.worker.build import Built
from pdserve.worker.memory import block_memory

_CHUNKS = {
    "decode": ((0, 1), (37, 1), (1023, 1), (16, 1)),
    "mixed": ((0, 1), (37, 1), (0, 230), (64, 133), (512, 16)),
}
_HEADS = ((32, 8, 128), (9, 3, 64), (28, 4, 128), (8, 8, 128))
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_BLOCK, _LAYERS = 16, 2
_TEXT_TOKENS = 48
_LOGIT_GAP = 0.05  # of the largest spread: bfloat16 turns nearly equal logits round


class Wrong(Exception):
    """A result differs from the reference; the message says which and how much."""


def kernels(setup: Setup) -> dict[str, object]:
    """Each operation against the reference in float32, on random inputs."""
    dtype = torch.float32 if setup.device.type == "cpu" else torch.bfloat16
    tested = SdpaKernels() if setup.device.type == "cpu" else choose("auto", device=setup.device)
    worst: dict[str, float] = {}
    for (name, chunks), heads, limits in itertools.product(_CHUNKS.items(), _HEADS, ((0, 0.0), (100, 0.0))):
        got = _attention_case(tested, chunks, heads, limits, dtype, setup.device)
        expected = _attention_case(ReferenceKernels(), chunks, heads, limits, torch.float32, torch.device("cpu"), dtype)
        for what, one, other in zip(("rotated", "pool", "attention"), got, expected, strict=True):
            key = f"{what} ({name})"
            worst[key] = max(worst.get(key, 0.0), _error(one, other, dtype, f"{key} of heads {heads}"))
    for got_each, expected_each in zip(
        _row_operations(tested, dtype, setup.device), _row_operations(ReferenceKernels(), dtype, None), strict=True
    ):
        worst[got_each[0]] = _error(got_each[1], expected_each[1], dtype, got_each[0])
    return {"kernels": tested.name, "worst_error": {name: round(error, 5) for name, error in worst.items()}}


def sampler(setup: Setup) -> dict[str, object]:
    """The device's sampler against torch's on the host."""
    logits = 3 * torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    plain = SamplingParams(max_tokens=9, seed=0)
    kinds = (
        plain,
        replace(plain, top_k=50),
        replace(plain, top_p=0.9),
        replace(plain, top_k=40, top_p=0.8, min_p=0.02),
        replace(plain, temperature=0.0),
    )
    rows = [SamplingRow(replace(kinds[i % len(kinds)], seed=i), i) for i in range(64)]
    table = torch.from_numpy(columns(rows))
    expected = choose_tokens(logits, RowParams(*table))
    got = chooser(setup.device)(logits.to(setup.device), RowParams(*table.to(setup.device))).cpu()
    same = int((got == expected).sum())
    if same < 63:  # one number may lie at a boundary of sums that were rounded differently
        raise Wrong(f"the sampler draws other tokens in {64 - same} of 64 rows")
    return {"same_of_64": same}


def checksum(setup: Setup) -> dict[str, object]:
    """Checksums of blocks of 8k tokens, as a push takes them, against those of their bytes on the host."""
    count = 512 if setup.device.type == "cuda" else 8
    memory = block_memory(torch.randn(count, 8, 32, 2, 16, 128, device=setup.device).to(torch.bfloat16))
    bounce = torch.empty(memory.block_bytes, dtype=torch.uint8).numpy()
    blocks = range(count)
    if list(memory.checksums(blocks)) != [memory.read(block, bounce) for block in blocks]:
        raise Wrong("checksums are not those of the host")
    by_read_s = elapsed_s(lambda: [memory.read(block, bounce) for block in blocks], setup.device)
    hashed_s = elapsed_s(lambda: list(memory.checksums(blocks)), setup.device)
    return {"by": memory.hashed_by, "ms": hashed_s * 1e3, "over_copies_to_the_host": hashed_s / by_read_s}


def text(setup: Setup) -> dict[str, object]:
    """Greedy text, token by token: each must be the reference's likeliest, or as good as that."""
    return _text_of(setup.build(share=0.7, max_batched_tokens=512))


def text_default(setup: Setup) -> dict[str, object]:
    """The same of the default model, whose weights are no noise."""
    folder = cache_folder() / "models" / NAME
    if not is_whole(folder):
        return {"skipped": f"{folder} is not there, or damaged: `pdserve up` fetches it"}
    return _text_of(setup.build(folder, share=0.7, max_batched_tokens=512))


def _text_of(built: Built) -> dict[str, object]:
    prompts = [random_prompt(length, length) for length in (5, 100, 700)]
    sequences = [add(built.engine, f"text {i}", prompt, _TEXT_TOKENS) for i, prompt in enumerate(prompts)]
    run_to_end(built.engine)
    decoder = built.engine.runner.model
    assert isinstance(decoder, Decoder)
    reference = Decoder(decoder.config, decoder.weights, ReferenceKernels(), 2048)
    worst, agreed = 0.0, 0
    for sequence in sequences:
        output = sequence.output
        logits = _reference_logits(reference, sequence.token_ids.tolist()[:-1], len(output), built.geometry.shape)
        chosen = logits.gather(1, torch.tensor(output.tolist(), device=logits.device).unsqueeze(1)).squeeze(1)
        gap = (logits.max(dim=1).values - chosen) / (logits.max(dim=1).values - logits.mean(dim=1))
        worst, agreed = max(worst, float(gap.max())), agreed + int((gap == 0).sum())
    if worst > _LOGIT_GAP:
        raise Wrong(f"a token of the text is {worst:.3f} of the spread below the reference's likeliest")
    return {"tokens": 3 * _TEXT_TOKENS, "the_likeliest": agreed, "worst_gap": round(worst, 5)}


def disaggregated(setup: Setup) -> dict[str, object]:
    """One engine computes prompts, the blocks' bytes go to another, which decodes: the text is that of one engine."""
    prefill, decode = (setup.build(share=share, max_batched_tokens=512).engine for share in (0.45, 0.9))
    source, target = block_memory(prefill.runner.pool), block_memory(decode.runner.pool)
    bounce = torch.empty(source.block_bytes, dtype=torch.uint8).numpy()
    for length in (5, 16, 333):
        prompt = random_prompt(length, length)
        mixed = add(decode, f"mixed {length}", prompt, _TEXT_TOKENS)
        run_to_end(decode)
        first = add(prefill, f"prefill {length}", prompt, _TEXT_TOKENS, prefill_only=True)
        while first.status is not Status.HANDING_OFF:
            step(prefill)
        second = add(decode, f"decode {length}", prompt, _TEXT_TOKENS, queue=False)
        decode.scheduler.reserve(second, 0.0, 1e9)
        for sent, landed in zip(first.block_ids, second.block_ids, strict=True):
            if source.read(sent, bounce) != target.write(landed, bounce):
                raise Wrong(f"block {sent} changed on its way")
        decode.scheduler.arrived(second, first.output)
        prefill.finish(first)
        run_to_end(decode)
        if second.output != mixed.output:
            raise Wrong(f"the text behind a prompt of {length} tokens differs from that of one engine")
    finish_all(decode)
    return {"prompts": 3, "equal": True}


def _attention_case(
    tested: Kernels,
    chunks: tuple[tuple[int, int], ...],
    heads: tuple[int, int, int],
    limits: tuple[int, float],
    dtype: torch.dtype,
    device: torch.device,
    rounded: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated qkv, the pool and the attention, on the host; inputs are the same numbers, of `rounded`."""
    query, kv, dim = heads
    batch, num_blocks = scattered_batch(chunks, _BLOCK)
    generator = torch.Generator().manual_seed(num_blocks)
    qkv = torch.randn(len(batch.positions), (query + 2 * kv) * dim, generator=generator)
    pool = torch.randn(num_blocks, kv, _LAYERS, 2, _BLOCK, dim, generator=generator)
    qkv, pool = (x.to(rounded or dtype).to(dtype).to(device) for x in (qkv, pool))
    angles = torch.outer(torch.arange(2048.0), 1e4 ** -(torch.arange(0, dim, 2) / dim))
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
    planner = tested if isinstance(tested, FlashInferKernels) else Mover()
    placed = planner.plan(batch, pool, dtype)
    tested.rope_append(qkv, cos_sin, placed, pool, 1, query)
    attended = tested.attention(qkv, placed, pool, 1, AttentionKind(query, dim**-0.5, *limits))
    return qkv.cpu(), pool.cpu(), attended.cpu()


def _row_operations(tested: Kernels, dtype: torch.dtype, device: torch.device | None) -> list[tuple[str, Tensor]]:
    """Names and results, on the host; without a device in float32, of the same numbers."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator).to(dtype)
        return x.float() if device is None else x.to(device)

    x, residual, weight, qk, wide = random(33, 1024), random(33, 1024), random(1024), random(33, 512), random(33, 2048)
    found = [("rms_norm", tested.rms_norm(x, weight, 1e-5)), ("silu_and_mul", tested.silu_and_mul(wide))]
    found += [("gelu_and_mul", tested.gelu_and_mul(wide)), ("gemma rms_norm", tested.rms_norm(x, weight, 1e-5, 1.0))]
    tested.norm_slices(qk, 128, 2, weight[:128].contiguous(), 1e-5)
    found += [("norm_slices", qk), ("add_rms_norm", tested.add_rms_norm(x, residual, weight, 1e-5))]
    return [(name, result.cpu()) for name, result in [*found, ("residual", residual)]]


def _error(got: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> float:
    """Relative, of the whole tensor."""
    error = float((got.float() - expected.float()).norm() / expected.float().norm())
    if not error < _TOLERANCE[dtype]:
        raise Wrong(f"{what} is off by {error:.2g}")
    return error


def _reference_logits(reference: Decoder, token_ids: list[int], count: int, block_shape: tuple[int, ...]) -> Tensor:
    """Of the last `count` tokens, float32, computed in one batch on the reference kernels."""
    norm, block_size = reference.weights.final_norm, block_shape[3]
    blocks = -(-len(token_ids) // block_size)
    params = SamplingParams(max_tokens=1, seed=0)
    sequence = Sequence("reference", array("I", token_ids), len(token_ids), params, root_key(b""), block_size, 0.0)
    sequence.block_ids.extend(range(blocks))
    ids, batch = build_batch((Chunk(sequence, len(token_ids)),))
    pool = torch.zeros(blocks, *block_shape, dtype=norm.dtype, device=norm.device)
    hidden = reference.forward(ids.to(pool.device), Mover().plan(batch, pool, pool.dtype), pool)
    return reference.logits(hidden[-count:])
