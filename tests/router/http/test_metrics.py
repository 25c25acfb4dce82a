"""Metrics of a request come from its timeline: counts, histograms and stages that sum to the TTFT."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from pdserve.errors import WorkerFailed
from pdserve.request import FinishReason
from router.generation import Tokens
from router.http.service import Service


async def test_one_generation(client: httpx.AsyncClient, dispatcher: Any, service: Service) -> None:
    dispatcher.script = [Tokens((39,)), Tokens((39, 39)), Tokens((39,)), Tokens((), FinishReason.LENGTH)]
    await client.post("/v1/completions", json={"model": "tiny", "prompt": "hey"})
    value = service.metrics.registry.get_sample_value
    labels = {"endpoint": "completions", "outcome": "length"}
    assert value("pdserve_requests_total", labels) == 1
    assert value("pdserve_prompt_tokens_total") == 3
    assert value("pdserve_cached_tokens_total", {"tier": "device"}) == 2
    assert value("pdserve_cached_tokens_total", {"tier": "disk"}) == 1
    assert value("pdserve_output_tokens_total") == 4
    assert value("pdserve_requests_in_flight") == 0
    for name, count in {"ttft": 1, "tpot": 1, "e2e": 1, "itl": 2}.items():
        assert value(f"pdserve_{name}_seconds_count") == count
    stages = ("tokenise", "route", "wait", "queue", "compute", "deliver")
    total = sum(value("pdserve_ttft_stage_seconds_sum", {"stage": stage}) or 0.0 for stage in stages)
    assert total == pytest.approx(value("pdserve_ttft_seconds_sum"))
    assert value("pdserve_handoff_stage_seconds_count", {"stage": "transfer"}) == 1


async def test_outcomes_are_status_codes_for_errors(
    client: httpx.AsyncClient, dispatcher: Any, service: Service
) -> None:
    await client.post("/v1/completions", json={})
    dispatcher.script = [WorkerFailed("Workers failed.")]
    await client.post("/v1/completions", json={"model": "tiny", "prompt": "hey"})
    for outcome in ("400", "502"):
        labels = {"endpoint": "completions", "outcome": outcome}
        assert service.metrics.registry.get_sample_value("pdserve_requests_total", labels) == 1
    assert service.metrics.registry.get_sample_value("pdserve_ttft_seconds_count") == 0


async def test_metrics_page(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    assert "pdserve_itl_seconds_bucket" in response.text


async def test_slow_requests_are_found_through_the_exemplars(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": "hey"})
    page = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert page.headers["content-type"].startswith("application/openmetrics-text")
    exemplar = f'# {{request_id="{answer.json()["id"]}"}}'
    for name in ("pdserve_ttft_seconds", "pdserve_e2e_seconds"):
        assert any(line.startswith(f"{name}_bucket") and exemplar in line for line in page.text.splitlines())
