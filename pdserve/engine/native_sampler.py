"""The sampler in C (pdserve/csrc/sampler.h): a row in a few passes over logits that stay in the cache."""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdserve.engine.sampler import LEAST_TEMPERATURE, Sampled, Sampler, SamplingRow, uniform
from pdserve.engine.token_counts import TokenCounts
from pdserve.engine.torch_sampler import TorchSampler
from pdserve.kernels.build import NativeUnavailable
from pdserve.kernels.library import INT, POINTER, bind, open_library
from pdserve.request import SamplingParams, TokenLogprobs

log = logging.getLogger(__name__)


class _Row(ctypes.Structure):
    """`SamplingRow` of sampler.h."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("allowed", ctypes.c_char_p),
        ("bias_ids", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("held_ids", ctypes.c_void_p),
        ("counted_ids", ctypes.c_void_p),
        ("in_output", ctypes.c_void_p),
        ("top_p", ctypes.c_double),
        ("uniform", ctypes.c_double),
        ("temperature", ctypes.c_float),
        ("least", ctypes.c_float),
        ("presence_penalty", ctypes.c_float),
        ("frequency_penalty", ctypes.c_float),
        ("repetition_penalty", ctypes.c_float),
        ("num_bias", ctypes.c_int32),
        ("num_held", ctypes.c_int32),
        ("num_counted", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("greedy", ctypes.c_int32),
    )


def fastest_sampler(threads: int) -> Sampler:
    """The compiled one where there is a compiler, else torch's. One log line where it is torch's."""
    try:
        return load(threads)
    except NativeUnavailable as error:
        log.warning("sampling: in torch, several times slower than compiled, because %s", error)
        return TorchSampler()


def load(threads: int) -> NativeSampler:
    """
    Raises:
        NativeUnavailable: it cannot be built or loaded here, or draws something else than the reference.
    """
    sampler = NativeSampler(open_library(), threads)
    logits, rows = _few_rows()
    drawn, expected = (each.sample(logits, rows) for each in (sampler, TorchSampler()))
    if not all(map(_agree, drawn, expected)):
        raise NativeUnavailable("the compiled sampler failed its self-check")
    return sampler


class NativeSampler(Sampler):
    """Its methods raise ValueError for logits that the library cannot read, and for tokens that they do not have."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._threads = threads
        self._choose = bind(library, "choose", INT, (POINTER, INT, INT, POINTER, INT))
        self._describe = bind(library, "describe", None, (POINTER, POINTER, *(INT,) * 3, *(POINTER,) * 4, INT))

    def choose(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
        _check(logits, len(rows))
        vocab = logits.shape[1]
        first, row_bytes = logits.data_ptr(), vocab * logits.element_size()
        alive: list[object] = []  # what the structures point to
        table = (_Row * len(rows))()
        for i, row in enumerate(rows):
            _fill(table[i], first + i * row_bytes, vocab, row, alive)
        tokens = np.empty(len(rows), np.int64)
        if not self._choose(ctypes.addressof(table), len(rows), vocab, tokens.ctypes.data, self._threads):
            raise ValueError(f"a token of the parameters lies outside the vocabulary of {vocab}")
        chosen: list[int] = tokens.tolist()
        return chosen

    def describe(self, logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        _check(logits, len(token_ids))
        rows, vocab = logits.shape
        tokens = np.array(token_ids, np.int64)
        if not (tokens.min() >= 0 and tokens.max() < vocab and 0 <= num_top <= vocab):
            raise ValueError(f"tokens outside the vocabulary of {vocab}, or {num_top} of it")
        logprobs, ranks = np.empty(rows, np.float32), np.empty(rows, np.int32)
        top_ids, tops = np.empty((rows, num_top), np.int32), np.empty((rows, num_top), np.float32)
        results = [each.ctypes.data for each in (logprobs, ranks, top_ids, tops)]
        self._describe(logits.data_ptr(), tokens.ctypes.data, rows, vocab, num_top, *results, self._threads)
        return [
            TokenLogprobs(logprob, rank, tuple(ids), tuple(values))
            for logprob, rank, ids, values in zip(
                logprobs.tolist(), ranks.tolist(), top_ids.tolist(), tops.tolist(), strict=True
            )
        ]


def _check(logits: Tensor, rows: int) -> None:
    on_cpu = logits.device.type == "cpu"
    if logits.dtype != torch.float32 or not (on_cpu and logits.is_contiguous() and logits.shape[0] == rows > 0):
        raise ValueError(f"logits must be float32, contiguous, on the CPU, of {rows} rows")


def _fill(into: _Row, logits: int, vocab: int, row: SamplingRow, alive: list[object]) -> None:
    """`logits` is the address of the row's."""
    params = row.params
    into.logits = logits
    into.greedy = params.greedy
    if not params.greedy:
        into.uniform = uniform(params.seed, row.index)
        into.temperature = max(params.temperature, LEAST_TEMPERATURE)
        into.least = math.log(params.min_p) if params.min_p > 0 else -math.inf
        into.top_k = params.top_k if 0 < params.top_k < vocab else vocab
        into.top_p = params.top_p
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        into.num_bias = len(ids)
        into.bias_ids = _address(np.array(ids, np.int64), alive)
        into.biases = _address(np.array(biases, np.float32), alive)
    if row.held_back:
        into.num_held = len(row.held_back)
        into.held_ids = _address(np.array(row.held_back, np.int64), alive)
    if row.counts is not None:
        _fill_counts(into, params, row.counts, alive)
    if row.mask is not None:
        allowed = row.mask.allowed()
        if allowed is not None and len(allowed) != vocab:
            raise ValueError(f"a mask of {len(allowed)} tokens does not fit a vocabulary of {vocab}")
        alive.append(allowed)
        into.allowed = allowed


def _fill_counts(into: _Row, params: SamplingParams, counts: TokenCounts, alive: list[object]) -> None:
    into.num_counted = len(counts.token_ids)
    into.counted_ids = _address(counts.token_ids, alive)
    into.in_output = _address(counts.in_output, alive)
    into.presence_penalty = params.presence_penalty
    into.frequency_penalty = params.frequency_penalty
    into.repetition_penalty = params.repetition_penalty


def _address(array: NDArray[Any], alive: list[object]) -> int:
    alive.append(array)
    address: int = array.__array_interface__["data"][0]
    return address


def _agree(drawn: Sampled, expected: Sampled) -> bool:
    """The same token, and log probabilities but for rounding."""
    if drawn.logprobs is None or expected.logprobs is None:
        return drawn == expected
    a, b = drawn.logprobs, expected.logprobs
    near = np.allclose((a.logprob, *a.top_logprobs), (b.logprob, *b.top_logprobs), atol=1e-4)
    return near and (drawn.token_id, a.rank, a.top_ids) == (expected.token_id, b.rank, b.top_ids)


def _few_rows() -> tuple[Tensor, list[SamplingRow]]:
    """Every way through the library, on the same numbers each time."""
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(0)) * 3
    counts = TokenCounts(range(50))
    counts.follow([7, 7, 60])
    ways: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"top_k": 5, "top_p": 0.8},
        {"top_p": 0.9, "logprobs": 3},
        {"temperature": 100.0, "top_p": 0.99},
        {"top_k": 700, "min_p": 0.01},
        {"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.2, "logprobs": 0},
        {"logit_bias": ((3, 9.0),), "min_tokens": 9, "stop_token_ids": (1, 2), "min_p": 0.1},
    )
    params = [SamplingParams(max_tokens=1, seed=3, **way) for way in ways]
    return logits, [SamplingRow(each, 1, counts if each.penalises else None) for each in params]
