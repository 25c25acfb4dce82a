"""Steps launched ahead of the ones before them, and decode batches through graphs, give the text of plain steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.pool import BlockPool
from pdserve.engine.config import EngineConfig
from pdserve.engine.decode_graphs import DecodeGraphs, graph_sizes
from pdserve.engine.device_runner import DeviceRunner, Mover
from pdserve.engine.device_sampler import choose_tokens
from pdserve.engine.engine import Engine
from pdserve.engine.runner import Flight, Runner
from pdserve.engine.scheduler import Plan
from pdserve.engine.sequence import Status
from pdserve.engine.torch_sampler import TorchSampler
from pdserve.kernels.flashinfer import FlashInferKernels
from pdserve.kernels.reference import ReferenceKernels
from pdserve.models.config import load_config
from pdserve.models.decoder import Decoder
from pdserve.models.weights import random_weights
from pdserve.request import SamplingParams
from tests.support.fake_flashinfer import FakeFlashInfer
from tests.support.oracle_model import OracleModel, empty_pool
from tests.support.tiny_engine import (
    BLOCK_SIZE,
    GEOMETRY,
    add,
    assert_idle,
    expected_of,
    make_sequence,
    output_of,
    prompt,
)

PLAIN = SamplingParams(max_tokens=9, seed=4, temperature=0.0)
MIXES = {
    "greedy": [PLAIN] * 3,
    "lengths": [replace(PLAIN, max_tokens=length) for length in (1, 2, 30, 7)],
    "drawn": [replace(PLAIN, temperature=1.0, top_p=0.9, seed=seed) for seed in range(4)],
    "stopping": [replace(PLAIN, max_tokens=40, stop_token_ids=tuple(range(i, 61, 9))) for i in range(6)],
    "penalised": [replace(PLAIN, temperature=0.7, frequency_penalty=1.5), PLAIN],
}


class Counting(DeviceRunner):
    """Counts the steps that were launched behind one under way."""

    ahead = 0

    def launch(self, plan: Plan, after: Flight | None = None) -> Flight:
        self.ahead += after is not None
        return super().launch(plan, after)


def device_engine(num_blocks: int = 40, sequences: int = 8) -> tuple[Engine, Counting]:
    config = EngineConfig(num_blocks, BLOCK_SIZE, 16, sequences, max_model_len=num_blocks * BLOCK_SIZE)
    runner = Counting(OracleModel(), empty_pool(GEOMETRY, num_blocks + 1), TorchSampler(), Mover(), torch.float32)
    return Engine(config, BlockPool(num_blocks, BLOCK_SIZE), runner), runner


def run(engine: Engine) -> None:
    while not engine.idle or engine.in_flight:
        engine.execute(engine.schedule(0.0), 0.0, look_ahead=True)


@pytest.mark.parametrize("mix", MIXES)
def test_steps_ahead_give_the_undisturbed_text(mix: str) -> None:
    engine, runner = device_engine()
    sequences = [make_sequence(f"s{i}", prompt(7 * i, 5), sampling=each) for i, each in enumerate(MIXES[mix])]
    add(engine, *sequences)
    run(engine)
    for sequence in sequences:
        assert output_of(sequence) == expected_of(sequence, engine)
    assert_idle(engine)
    assert (runner.ahead > 0) == (mix != "penalised")


@settings(max_examples=40)
@given(st.data())
def test_in_a_pool_that_is_too_small(data: st.DataObject) -> None:
    """Preemption, admission, aborts and steps ahead in any order; nothing is left at the end."""
    engine, _ = device_engine(num_blocks=data.draw(st.integers(8, 14)), sequences=3)
    count = data.draw(st.integers(1, 6))
    sequences = []
    for i in range(count):
        stops = data.draw(st.sets(st.integers(0, 60), max_size=6))
        params = replace(PLAIN, max_tokens=data.draw(st.integers(1, 14)), stop_token_ids=tuple(sorted(stops)))
        sequences.append(make_sequence(f"s{i}", prompt(data.draw(st.integers(0, 3)), 6), sampling=params))
    waiting, aborted = list(sequences), set()
    while waiting or not engine.idle or engine.in_flight:
        if waiting and not engine.in_flight:
            add(engine, waiting.pop())
        if not engine.in_flight and data.draw(st.integers(0, 9)) == 0:
            victim = data.draw(st.sampled_from([s for s in sequences if s not in waiting]))
            aborted |= {victim} if victim.status is not Status.FINISHED else set()
            assert engine.finish(victim) == []
        if engine.idle and not engine.in_flight:
            continue
        # As the engine's thread does: a command that waits is run with nothing under way.
        engine.execute(engine.schedule(0.0), 0.0, look_ahead=data.draw(st.booleans()))
    for sequence in sequences:
        expected = expected_of(sequence, engine)
        assert output_of(sequence) == (expected[: sequence.num_output_tokens] if sequence in aborted else expected)
    assert_idle(engine)


def test_a_sequence_that_ended_keeps_its_blocks_until_its_last_row_is_computed() -> None:
    engine, _ = device_engine()
    first = expected_of(make_sequence("probe", prompt(0, 5), 4), engine)
    stopping = make_sequence("stops", prompt(0, 5), sampling=replace(PLAIN, stop_token_ids=(first[1],)))
    add(engine, stopping, make_sequence("goes on", prompt(9, 5), 20))
    while not (tokens := engine.execute(engine.schedule(0.0), 0.0, look_ahead=True)) or tokens[0].finish_reason is None:
        pass
    assert engine.in_flight
    assert engine.pool.holds("stops")
    engine.execute(engine.schedule(0.0), 0.0)
    assert not engine.pool.holds("stops")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_through_flashinfer_and_graphs(make_checkpoint: Callable[..., Path], temperature: float) -> None:
    """Batches of 1 to 5 through graphs for 2 and 4, and larger ones without; windows on one layer of two."""
    folder = make_checkpoint("Qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1)
    config = load_config(folder)
    weights = random_weights(config, "float32", 0)

    def texts(device: bool) -> list[list[int]]:
        limits = EngineConfig(64, BLOCK_SIZE, 64, 8, max_model_len=128)
        shape = (config.num_kv_heads, config.num_layers, 2, BLOCK_SIZE, config.head_dim)
        pool = torch.zeros(65, *shape)
        if device:
            kernels = FlashInferKernels(FakeFlashInfer(), torch.device("cpu"))
            model = Decoder(config, weights, kernels, 128)
            runner: Runner = DeviceRunner(model, pool, TorchSampler(), kernels, torch.float32)
            engine = Engine(limits, BlockPool(64, BLOCK_SIZE), runner)
            engine.warm_up()  # which kinds of attention there are is learnt in it
            graphs = DecodeGraphs(model, pool, kernels, torch.float32, choose_tokens, 32, record=lambda work: work)
            graphs.capture((2, 4), has_room=lambda: True)
            assert graphs.sizes == [2, 4]
            runner.graphs = graphs  # type: ignore[attr-defined]
        else:
            runner = Runner(Decoder(config, weights, ReferenceKernels(), 128), pool, TorchSampler())
            engine = Engine(limits, BlockPool(64, BLOCK_SIZE), runner)
        sequences = [
            make_sequence(f"s{i}", prompt(3 * i, 3 + 5 * i), sampling=SamplingParams(8 + i, i, temperature))
            for i in range(5)
        ]
        add(engine, *sequences)
        run(engine)
        return [output_of(sequence) for sequence in sequences]

    assert texts(device=True) == texts(device=False)


def test_without_room_the_rest_runs_without_graphs(caplog: pytest.LogCaptureFixture) -> None:
    runner = DeviceRunner(OracleModel(), empty_pool(GEOMETRY, 5), TorchSampler(), Mover(), torch.float32)
    graphs = DecodeGraphs(
        OracleModel(), runner.pool, FakePlanner(), torch.float32, choose_tokens, 4, record=lambda work: work
    )
    room = iter((True, False))
    graphs.capture((1, 2, 4), has_room=lambda: next(room))
    assert graphs.sizes == [4]
    assert "of 2 sequences and fewer" in caplog.text


class FakePlanner(Mover):
    def plan(self, batch, pool, dtype, frame=None):  # type: ignore[no-untyped-def]
        return super().plan(batch, pool, dtype)

    def frame(self, batch_size: int, max_blocks: int) -> int:
        return batch_size


def test_sizes_of_graphs() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    assert graph_sizes(130) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 128, 130]
