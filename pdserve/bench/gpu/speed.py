"""Speed beside floors measured in the same run: what a copy moves and what a large product computes here and now."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import get_args

import torch

from kvstore.errors import TransferError
from kvstore.transfer.checksum import block_checksum
from kvstore.transfer.transport import Completion, Link, Outcome, Transport
from pdserve.bench.gpu.drive import Setup, add, elapsed_s, finish_all, give_back, random_prompt, step, wait_for
from pdserve.bench.gpu.shapes import SHAPES
from pdserve.engine.engine import Engine
from pdserve.kernels import choose, flashinfer
from pdserve.kernels.base import AttentionKind, Batch
from pdserve.kernels.flashinfer import FlashInferKernels
from pdserve.kernels.scattered import scattered_batch
from pdserve.models.config import ModelConfig
from pdserve.models.decoder import Decoder
from pdserve.models.weights import weight_bytes
from pdserve.worker.config import TransportName
from pdserve.worker.data_plane import open_transport
from pdserve.worker.memory import BlockMemory, PinnedArena, block_memory

_DECODES = ((1, 1024), (8, 1024), (32, 1024), (64, 1024), (32, 8192))  # sequences, context
_PREFILLS = (2048, 8192)
_STEPS = 32
_LLAMA_8B = AttentionKind(32, 128**-0.5)
_PUSH_BLOCKS = 64  # of a pool, sent and received again and again
_PUSH_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Floors:
    copy_bytes_per_s: float  # read and written
    flops_per_s: float

    @classmethod
    def measured(cls, device: torch.device) -> Floors:
        count, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 22, 512)
        source = torch.empty(count, dtype=torch.bfloat16, device=device)
        target = torch.empty_like(source)
        copy_s = elapsed_s(lambda: target.copy_(source), device)
        a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
        return cls(2 * 2 * count / copy_s, 2 * side**3 / elapsed_s(lambda: a @ b, device))


def floors(setup: Setup) -> dict[str, object]:
    measured = Floors.measured(setup.device)
    return {"copy_tb_s": measured.copy_bytes_per_s / 1e12, "gemm_tflops": measured.flops_per_s / 1e12}


def decode(setup: Setup) -> dict[str, object]:
    """Whole steps, as the worker runs them: scheduled, planned, launched ahead, sampled, read."""
    floor, built = Floors.measured(setup.device), setup.build()
    engine, config = built.engine, _config_of(built.engine)
    dtype_bytes = engine.runner.pool.element_size()
    read_bytes = weight_bytes(config, "bfloat16") - 2 * config.vocab_size * config.hidden_size  # of embeddings few rows
    token_bytes = 2 * config.num_layers * config.kv_size * dtype_bytes
    found: dict[str, object] = {}
    for count, context in _DECODES:
        if (refusal := _no_room(engine, count, context + _STEPS + 64)) is not None:
            found[f"{count}x{context}"] = refusal
            continue
        step_s = _decode_step_s(engine, setup.device, count, context)
        weights_s = max(read_bytes / floor.copy_bytes_per_s, read_bytes * count / floor.flops_per_s)
        floor_s = weights_s + count * context * token_bytes / floor.copy_bytes_per_s
        found[f"{count}x{context}"] = _beside(step_s, floor_s)
    return found


def prefill(setup: Setup) -> dict[str, object]:
    floor, built = Floors.measured(setup.device), setup.build()
    engine, config = built.engine, _config_of(built.engine)
    body = weight_bytes(config, "bfloat16") // 2 - 2 * config.vocab_size * config.hidden_size
    found: dict[str, object] = {}
    for length in _PREFILLS:
        if (refusal := _no_room(engine, 1, length + 16)) is not None:
            found[str(length)] = refusal
            continue
        numbers = itertools.count()
        run_s = elapsed_s(partial(_prefill_once, engine, length, numbers), setup.device, rounds=3)
        attention = 4 * config.q_size * config.num_layers * length * (length + 1) / 2
        flops = 2 * body * length + attention
        found[str(length)] = {**_beside(run_s, flops / floor.flops_per_s), "mfu": flops / run_s / floor.flops_per_s}
    return found


def layout(setup: Setup) -> dict[str, object]:
    """Decode attention over the pool as it is, and over one tensor a layer: what the strides cost."""
    kernels = choose("auto", device=setup.device)
    if not isinstance(kernels, FlashInferKernels):
        return {"skipped": f"the {kernels.name} kernels do not read through strides"}
    found: dict[str, object] = {}
    for count, context in ((32, 1024), (8, 8192)):
        batch, num_blocks = scattered_batch(((context - 1, 1),) * count, 16)
        qkv = torch.randn(count, 48 * 128, device=setup.device).to(torch.bfloat16)
        times_s = []
        for layers in (32, 1):
            pool = torch.randn(num_blocks, 8, layers, 2, 16, 128, dtype=torch.bfloat16, device=setup.device)
            planned = kernels.plan(batch, pool, torch.bfloat16)
            times_s.append(elapsed_s(partial(_attend_in_all_layers, kernels, qkv, planned, pool), setup.device))
        found[f"{count}x{context}"] = {"pool_over_layer": times_s[0] / times_s[1]}
    return found


def backends(setup: Setup) -> dict[str, object]:
    """Prefill attention of one layer by fa2 and by fa3, of which `auto` takes the second on Hopper."""
    found: dict[str, object] = {}
    try:
        tested = {name: flashinfer.load(setup.device, 128, torch.bfloat16, name) for name in ("fa2", "fa3")}
    except flashinfer.FlashInferUnavailable as error:
        return {"skipped": str(error)}
    for length in _PREFILLS if setup.device.type == "cuda" else (64,):
        batch, num_blocks = scattered_batch(((0, length),), 16)
        qkv = torch.randn(length, 48 * 128, device=setup.device).to(torch.bfloat16)
        pool = torch.randn(num_blocks, 8, 1, 2, 16, 128, dtype=torch.bfloat16, device=setup.device)
        times_s = {}
        for name, kernels in tested.items():
            planned = kernels.plan(batch, pool, torch.bfloat16)
            attend = partial(kernels.attention, qkv, planned, pool, 0, _LLAMA_8B)
            times_s[name] = elapsed_s(attend, setup.device)
        milliseconds = {f"{name}_ms": time_s * 1e3 for name, time_s in times_s.items()}
        found[str(length)] = {**milliseconds, "fa3_over_fa2": times_s["fa3"] / times_s["fa2"]}
    return found


def tier(setup: Setup) -> dict[str, object]:
    """Blocks to the host and back, in memory pinned as the store's is, beside plain copies of pinned memory.

    Ours hash each block as well: `checksum_ms`, of the same bytes.
    """
    pool = torch.zeros(64, 8, 32, 2, 16, 128, dtype=torch.bfloat16, device=setup.device)
    memory = block_memory(pool)
    pinned = torch.empty(pool.shape, dtype=pool.dtype, pin_memory=setup.device.type == "cuda")
    arena = torch.zeros(len(pool) * memory.block_bytes, dtype=torch.uint8).numpy()
    pin = PinnedArena() if setup.device.type == "cuda" else None
    if pin is not None:
        pin(arena)
    slots = list(enumerate(arena.reshape(len(pool), -1)))
    out_s = elapsed_s(lambda: [memory.read(block, slot) for block, slot in slots], setup.device)
    in_s = elapsed_s(lambda: [memory.write(block, slot) for block, slot in slots], setup.device)
    hash_s = elapsed_s(lambda: [block_checksum(slot) for _, slot in slots], setup.device)
    if pin is not None:
        pin(None)
    return {
        "checksum_ms": hash_s * 1e3,
        "to_host": _beside(out_s, elapsed_s(lambda: pinned.copy_(pool), setup.device)),
        "to_device": _beside(in_s, elapsed_s(lambda: pool.copy_(pinned), setup.device)),
    }


def push(setup: Setup) -> dict[str, object]:
    """Blocks of Llama-3-8B from one process to another on the same device, over each transport that workers have."""
    floor = Floors.measured(setup.device)
    return {name: _push_by(name, setup.device, floor) for name in get_args(TransportName)}


def transformers(setup: Setup) -> dict[str, object]:
    """A decode step of the same shape in transformers and here, batch 1, context 1024."""
    if importlib.util.find_spec("transformers") is None:
        return {"skipped": "transformers is not installed"}
    theirs_s = _transformers_step_s(setup)
    give_back(setup.device)
    ours_s = _decode_step_s(setup.build().engine, setup.device, 1, 1024)
    return {"step_ms": theirs_s * 1e3, "ours_ms": ours_s * 1e3, "ratio": theirs_s / ours_s}


def _transformers_step_s(setup: Setup) -> float:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {name: value for name, value in SHAPES[setup.shape].items() if name != "architectures"}
    config = AutoConfig.for_model(str(values.pop("model_type")), **values)
    with torch.device(setup.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train(False)  # type: ignore[no-untyped-call]
    prompt = torch.tensor([random_prompt(1024, 0)], device=setup.device)

    def generate(count: int) -> float:
        return elapsed_s(
            lambda: model.generate(prompt, min_new_tokens=count, max_new_tokens=count, do_sample=False),
            setup.device,
            rounds=3,
        )

    return (generate(_STEPS + 1) - generate(1)) / _STEPS


def _config_of(engine: Engine) -> ModelConfig:
    assert isinstance(engine.runner.model, Decoder)
    return engine.runner.model.config


def _decode_step_s(engine: Engine, device: torch.device, count: int, context: int) -> float:
    """Of `count` sequences of `context` tokens, as the worker runs it."""
    sequences = [add(engine, f"{count}/{context}/{i}", random_prompt(context, i), _STEPS + 40) for i in range(count)]
    while not all(sequence.decoding for sequence in sequences):
        step(engine, look_ahead=False)
    for _ in range(4):
        step(engine)
    wait_for(device)
    began_s = time.perf_counter()
    for _ in range(_STEPS):
        step(engine)
    step_s = (time.perf_counter() - began_s) / _STEPS
    finish_all(engine)
    return step_s


def _no_room(engine: Engine, count: int, tokens: int) -> str | None:
    """Why so many sequences of so many tokens cannot be; None if they can."""
    if tokens > engine.config.max_model_len:
        return "longer than this model allows"
    return "the pool is too small" if count * tokens > engine.config.num_blocks * engine.config.block_size else None


def _prefill_once(engine: Engine, length: int, numbers: Iterator[int]) -> None:
    number = next(numbers)
    add(engine, f"prefill {length}/{number}", random_prompt(length, number), 1)
    while not engine.idle:
        step(engine, look_ahead=False)


def _attend_in_all_layers(kernels: FlashInferKernels, qkv: torch.Tensor, batch: Batch, pool: torch.Tensor) -> None:
    for layer in range(32):
        kernels.attention(qkv, batch, pool, layer % pool.shape[2], _LLAMA_8B)


def _beside(measured_s: float, floor_s: float) -> dict[str, float]:
    return {"ms": measured_s * 1e3, "floor_ms": floor_s * 1e3, "ratio": measured_s / floor_s}


def _push_pool(device: torch.device) -> torch.Tensor:
    return torch.ones(_PUSH_BLOCKS, 8, 32, 2, 16, 128, dtype=torch.bfloat16, device=device)


class _Count:
    """Completions of a link; the number that have come, and the first that was no success."""

    def __init__(self) -> None:
        self.number = 0
        self.failure = ""

    def __call__(self, completion: Completion) -> None:
        if completion.outcome is not Outcome.DONE:
            self.failure = self.failure or completion.error or completion.outcome.value
        self.number += 1

    def wait(self, number: int) -> None:
        until_s = time.monotonic() + _PUSH_DEADLINE_S
        while self.number < number and not self.failure:
            if time.monotonic() > until_s:
                raise TransferError("a push did not end")
            time.sleep(0.0001)
        if self.failure:
            raise TransferError(self.failure)


def _push_by(name: TransportName, device: torch.device, floor: Floors) -> dict[str, object]:
    """Both ends are processes of their own: no two transports bring their libraries into one."""
    context = multiprocessing.get_context("spawn")
    result, told = context.Pipe(duplex=False)
    sender_end, receiver_end = context.Pipe()
    ends = [
        context.Process(target=_send, args=(name, sender_end, told, str(device))),
        context.Process(target=_receive, args=(name, receiver_end, str(device))),
    ]
    for each in ends:
        each.start()
    try:
        if not result.poll(3 * _PUSH_DEADLINE_S):
            return {"error": "no answer"}
        answer = result.recv()
    finally:
        for each in ends:
            each.join(20)
            each.kill()
    if isinstance(answer, str):
        return {"error": answer}
    found: dict[str, object] = {"lanes": answer["lanes"]}
    for count, push_s in answer["times_s"].items():
        floor_s = 2 * count * answer["block_bytes"] / floor.copy_bytes_per_s
        found[f"{count * 16} tokens"] = _beside(push_s, floor_s)
    return found


def _end(name: TransportName, device: str, done: _Count) -> tuple[BlockMemory, Transport, Link]:
    pool = _push_pool(torch.device(device))
    memory = block_memory(pool)
    transport = open_transport(name, memory, memory.scratch(1 << 20), pool.device)
    return memory, transport, transport.open(done, same_host=True)


def _send(name: TransportName, peer: Connection, result: Connection, device: str) -> None:
    try:
        done, total = _Count(), 0
        memory, transport, link = _end(name, device, done)
        link.connect(peer.recv())
        peer.send(link.address)
        times_s: dict[int, float] = {}
        for count in (64, 512):
            for _ in range(4):
                peer.send(count)
                peer.recv()
                began_s = time.perf_counter()
                for block in range(count):
                    link.send(total + block, memory.block(block % _PUSH_BLOCKS))
                peer.recv()
                times_s[count] = min(times_s.get(count, float("inf")), time.perf_counter() - began_s)
                total += count
                done.wait(total)
        peer.send(0)
        result.send({"lanes": link.describe(), "times_s": times_s, "block_bytes": memory.block_bytes})
        transport.close()
    except Exception as error:
        result.send(f"{type(error).__name__}: {error}")
        peer.close()


def _receive(name: TransportName, peer: Connection, device: str) -> None:
    done, total = _Count(), 0
    memory, transport, link = _end(name, device, done)
    peer.send(link.address)
    with contextlib.suppress(EOFError):  # the sender tells what went wrong
        link.connect(peer.recv())
        while count := peer.recv():
            for block in range(count):
                link.receive(total + block, memory.block(block % _PUSH_BLOCKS))
            peer.send("posted")
            total += count
            done.wait(total)
            peer.send("landed")
    transport.close()
