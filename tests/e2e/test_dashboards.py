"""Every panel shows something: a real Prometheus scrapes real processes, and `promtool` likes what they export."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import MakeStack
from tests.support.chart import CHART, tool
from tests.support.stack import Stack, get_json

pytestmark = pytest.mark.e2e

# Series that begin with the first event of a kind that a healthy, half-empty deployment does not have.
RARE = (
    "pdserve_router_events_total",
    "pdserve_store_evicted_blocks_total",
    "pdserve_store_fetch_bytes_total",
    "pdserve_store_hit_blocks_total",  # the workers' own pools still have every block
    "pdserve_store_fetched_bytes_total",
    "pdserve_refused_requests_total",
    "pdserve_admission_checked_total",
    'missed_by!="none"',
)
STORE = ("--host-bytes", "64MiB", "--disk-bytes", "64MiB", "--policy", "all", "--disk-path")
PROMPT = "The fox said to the hen, number after number, that the yard was large and the night was long. " * 4


@pytest.fixture(scope="module")
def stack(make_stack: MakeStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    disk = tmp_path_factory.mktemp("disk")
    with make_stack(store=(*STORE, str(disk)), prefill=1, decode=1) as stack:
        yield stack


def targets(stack: Stack) -> dict[str, str]:
    """Address by component, as the chart's PodMonitors name them."""
    assert stack.store is not None
    workers = {worker.worker_id.split("-")[0]: worker.admin_address for worker in stack.workers.values()}
    return {"router": f"127.0.0.1:{stack.port}", "store": stack.store.admin_address, **workers}


@pytest.fixture(scope="module")
def prometheus(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("prometheus")
    scrapes = [
        {
            "targets": [address],
            "labels": {
                "component": component,
                "pod": component,
                "namespace": "serving",
                "model_name": stack.model.name,
            },
        }
        for component, address in targets(stack).items()
    ]
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "pdserve", "static_configs": scrapes}],
    }
    (folder / "prometheus.json").write_text(json.dumps(config))  # JSON is YAML
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [tool("prometheus"), f"--config.file={folder / 'prometheus.json'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}", "--log.level=error"]
    with subprocess.Popen(command) as process:
        try:
            yield f"http://{address}"
        finally:
            process.terminate()


def has_data(url: str, expr: str) -> bool:
    try:
        answer = get_json(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': expr})}")
    except OSError:  # it is still starting
        return False
    return bool(answer["data"]["result"])


def ask(stack: Stack, number: int) -> None:
    body = {"model": stack.model.name, "prompt": PROMPT + str(number), "max_tokens": 4, "temperature": 0}
    # A class whose objectives a busy machine meets too: else there would be no goodput to show.
    headers = {"content-type": "application/json", "x-pdserve-slo": "batch"}
    request = urllib.request.Request(f"{stack.url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["usage"]["completion_tokens"]


def test_every_panel_has_data_under_load(stack: Stack, prometheus: str) -> None:
    empty = {}
    for path in sorted((CHART / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expr = target["expr"].replace("$namespace", ".*").replace("$model_name", stack.model.name)
                expr = expr.replace("$__rate_interval", "1m")
                if not any(name in expr for name in RARE):
                    empty[expr] = f"{path.stem}: {panel['title']}"
    assert len(empty) > 80
    deadline_s = time.monotonic() + 60
    number = 0
    while empty and time.monotonic() < deadline_s:
        ask(stack, number)
        number += 1
        empty = {expr: where for expr, where in empty.items() if not has_data(prometheus, expr)}
    assert not empty


def test_names_and_units_pass_promtool(stack: Stack) -> None:
    """But for vLLM's names, whose colons break the rule."""
    ask(stack, 0)
    for component, address in targets(stack).items():
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        own = "\n".join(line for line in lines if "vllm:" not in line) + "\n"
        assert own.count("pdserve_") > 20
        assert "pdserve_build_info{" in own, component
        done = subprocess.run(
            [tool("promtool"), "check", "metrics"], input=own, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{component}: {done.stderr}"
