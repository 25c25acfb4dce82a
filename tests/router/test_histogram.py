"""Our histogram shows what prometheus_client's would, sample for sample, exemplars included."""

from __future__ import annotations

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest

from router.histogram import Histogram

BOUNDS = (0.001, 0.5, 2.0)
AMOUNTS = st.lists(st.one_of(st.sampled_from((0.0, *BOUNDS)), st.floats(0, 10)), max_size=20)


def theirs(registry: CollectorRegistry, labels: tuple[str, ...]) -> prometheus_client.Histogram:
    return prometheus_client.Histogram("t_seconds", "Text.", labels, registry=registry, buckets=BOUNDS)


def shown(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    samples = [sample for family in registry.collect() for sample in family.samples]
    return {
        (each.name, tuple(sorted(each.labels.items()))): each.value
        for each in samples
        if not each.name.endswith("_created")
    }


@given(amounts=AMOUNTS)
def test_without_a_label(amounts: list[float]) -> None:
    our_registry, their_registry = CollectorRegistry(), CollectorRegistry()
    ours, reference = Histogram(our_registry, "t_seconds", "Text.", BOUNDS), theirs(their_registry, ())
    for amount in amounts:
        ours.observe(amount)
        reference.observe(amount)
    assert shown(our_registry) == shown(their_registry)


@given(amounts=st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 10)), max_size=20))
def test_with_a_label(amounts: list[tuple[str, float]]) -> None:
    our_registry, their_registry = CollectorRegistry(), CollectorRegistry()
    ours, reference = Histogram(our_registry, "t_seconds", "Text.", BOUNDS, "stage"), theirs(their_registry, ("stage",))
    for stage, amount in amounts:
        ours.of(stage).observe(amount)
        reference.labels(stage).observe(amount)
    assert shown(our_registry) == shown(their_registry)


def test_exemplars_are_those_of_the_last_observation_in_their_bucket() -> None:
    registry = CollectorRegistry()
    histogram = Histogram(registry, "t_seconds", "Text.", BOUNDS)
    for number, amount in enumerate((0.4, 0.3, 1.0)):
        histogram.observe(amount, {"request_id": f"r{number}"})
    histogram.observe(0.2)
    lines = [line for line in generate_latest(registry).decode().splitlines() if "#" in line[1:]]
    assert [line.split(" # ")[1].rsplit(" ", 1)[0] for line in lines] == [
        '{request_id="r1"} 0.3',
        '{request_id="r2"} 1.0',
    ]


def test_two_under_one_name_are_refused() -> None:
    registry = CollectorRegistry()
    Histogram(registry, "t_seconds", "Text.", BOUNDS)
    with pytest.raises(ValueError, match="Duplicated"):
        Histogram(registry, "t_seconds", "Text.", BOUNDS)
