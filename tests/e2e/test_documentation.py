"""What README and docs tell a reader to type works, all of it on one server that `make serve` started.

Ports, folders and lengths are those of the test (`Served.script`); what is not run is named with its reason.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.api_client import ApiClient
from tests.support.documented import ROOT, Block, block, blocks
from tests.support.foreign_endpoint import foreign_endpoint
from tests.support.stack import get_json, wait_for

pytestmark = pytest.mark.e2e

READY_S = 120.0
STOP_S = 20.0
MODEL = "SmolLM2-135M-Instruct"

# By page and beginning: who starts it here, or why nobody does; tests/test_docs.py checks the options of all.
NOT_RUN = {
    ("README.md", "make serve"): "the fixture starts it, and `make test` is what runs this",
    ("quickstart.md", "make serve"): "the fixture starts it",
    ("operate.md", "pdserve up"): "further deployments of what `make serve` and `make loadtest` start",
    ("models.md", "pdserve up"): "these checkpoints are not at hand",
    ("operate.md", "curl -X POST   -H"): "the console's tests drain and use again",
    ("operate.md", "pdserve role"): "tests/e2e/test_roles.py: it takes two workers of a role",
    ("operate.md", "pdserve worker"): "test_parts_join_from_several_machines",
    ("operate.md", "pdserve store"): "test_parts_join_from_several_machines",
    ("gpu.md", "pip install"): "no GPU; tests/pdserve/test_gpu_check.py runs the same checks small, on a CPU",
    ("tenants.md", "pdserve router"): "tests/e2e/test_tenants.py has one",
    ("loadtest.md", "make loadtest"): "test_sweep",
    ("loadtest.md", "locust"): "test_locust_...",
    ("kubernetes.md", "pdserve key"): "needs a cluster; test_page runs the same command of tenants.md",
    ("kubernetes.md", "docker build"): "no Docker, registry or cluster; tests/helm has a stand-in for the last",
}
# A sweep or a run that takes minutes, in seconds.
SHORT = "--prompt-tokens 64 --output-tokens 4"


@dataclass(frozen=True, slots=True)
class Served:
    """`folder`: where commands run; it looks like the project's."""

    port: int
    folder: Path
    redis: str
    store: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PDSERVE_URL": self.url}

    def script(self, text: str, replace: Mapping[str, str] | None = None) -> str:
        """A block with the names of this machine."""
        names = {"127.0.0.1:8000": f"127.0.0.1:{self.port}", "--port 8000": f"--port {free_port()}"}
        names |= {"redis://10.0.0.1:6379/0": self.redis, "10.0.0.5": "127.0.0.1", "10.0.0.6": "127.0.0.1"}
        names |= {"--model DIR": f"--model {model_folder()}", "SOCKET": str(self.store), " KEY ": " $(cat KEY) "}
        names |= {"curl ": "curl --fail "}
        names |= {"/run/pdserve/": f"{self.folder}/", "/nvme/": f"{self.folder}/", "64GiB": "64MiB", "1TiB": "64MiB"}
        for shown, here in {**names, **(replace or {})}.items():
            text = text.replace(shown, here)
        return text

    def run(self, text: str, given: str = "", timeout_s: float = 120.0) -> str:
        """Runs a script as bash does and returns what it printed."""
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", text],
            cwd=self.folder,
            env=self.environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def model_folder() -> Path:
    from pdserve.launch.folders import cache_folder
    from pdserve.models.default_model import ensure_default_model

    return ensure_default_model(cache_folder(), lambda description, fraction: None)


@pytest.fixture(scope="module")
def served(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("project")
    for path in ROOT.iterdir():
        if path.name != "loadtest-report":
            (folder / path.name).symlink_to(path)
    runtime = tmp_path_factory.mktemp("run")
    port, output = free_port(), runtime / "output"
    # Nothing is installed by a test, whatever is older than what.
    options = f"--port {port} --host-bytes 64MiB --disk-bytes 64MiB --disk-path {runtime / 'disk'}"
    command = ["make", "-o", ".venv/.serve", "serve", f"UP={options}"]
    with output.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "XDG_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(ROOT)},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: "ready on" in output.read_text() or process.poll() is not None, READY_S, output.read_text)
        assert process.poll() is None, output.read_text()
        [run_folder] = runtime.glob("pdserve-*")
        served = Served(port, folder, f"unix://{run_folder}/redis.sock", run_folder / "store.sock")
        make_what_commands_name(served)
        yield served
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        process.wait(STOP_S)
    assert not run_folder.exists()


def make_what_commands_name(served: Served) -> None:
    """TRACE, and a request ID; blocks in the store, of which one is KEY, are its prompt's."""
    row = {"timestamp": 0, "input_length": 700, "output_length": 7, "hash_ids": [0, 1]}
    (served.folder / "TRACE").write_text(f"{json.dumps(row)}\n" * 20)
    ApiClient(served.port, MODEL, headers={"X-Request-Id": "ID"}).complete("The tide rises and falls, " * 10)
    listing = f"pdserve kv ls --socket {served.store} --limit 1 --json"
    wait_for(lambda: bool(json.loads(served.run(listing))), 30.0, lambda: "the store has no block")
    [block] = json.loads(served.run(listing))
    (served.folder / "KEY").write_text(block["key"])


def pages() -> dict[str, str]:
    """By page: all that a reader would type, from the top to the bottom."""
    scripts: dict[str, str] = {}
    for each in blocks("sh"):
        if not any(each.page == page and each.text.startswith(beginning) for page, beginning in NOT_RUN):
            scripts[each.page] = scripts.get(each.page, "") + each.text
    return scripts


@pytest.mark.parametrize("page", pages())
def test_page(served: Served, page: str) -> None:
    assert served.run(served.script(pages()[page]), given="What is gravity?\n/quit\n")


@pytest.mark.parametrize("shown", [each for each in blocks("python") if "base_url" in each.text], ids=str)
def test_python_block(served: Served, shown: Block) -> None:
    done = subprocess.run([sys.executable, "-c", served.script(shown.text)], capture_output=True, text=True, check=True)
    assert done.stdout.strip()


def test_parts_join_from_several_machines(served: Served) -> None:
    """Store node, workers and router, of machines that share a Redis; all end well when they are told to."""
    text = block("operate.md", "pdserve store").text + block("operate.md", "pdserve worker").text
    commands = served.script(text.replace("\\\n", " ")).splitlines()
    port = next(re.findall(r"--port (\d+)", command)[0] for command in commands if "router" in command)
    before = len(get_json(f"{served.url}/workers")["workers"])
    roles = [command for command in commands if command.startswith("pdserve worker")]
    processes: list[subprocess.Popen[bytes]] = []

    def joined() -> bool:
        assert [process.args for process in processes if process.poll() is not None] == []
        try:
            seen = get_json(f"http://127.0.0.1:{port}/workers")["workers"]
        except OSError:
            return False
        return [worker["state"] for worker in seen].count("ready") == before + len(roles)

    with (served.folder / "parts.log").open("wb") as log:
        try:
            processes.extend(
                subprocess.Popen(command.split(), cwd=served.folder, env=served.environment, stdout=log, stderr=log)
                for command in commands
            )
            wait_for(joined, READY_S, (served.folder / "parts.log").read_text)
        finally:
            for process in processes:
                process.terminate()
            codes = [process.wait(STOP_S) for process in processes]
    assert codes == [0] * len(commands)


def test_sweep(served: Served) -> None:
    """Of a deployment that it starts, and of a running one and a foreign endpoint together."""
    make, sweep = block("loadtest.md", "make loadtest").text.splitlines()
    brief = f"{SHORT} --points 1 --point 2"
    made = f'make -o .venv/.loadtest loadtest TARGETS=mixed LOADTEST="{brief} --out made"'
    served.run(make.replace("make loadtest", made), timeout_s=240.0)
    [mixed] = json.loads((served.folder / "made" / "report.json").read_text())["results"]
    assert mixed["points"][0]["failed"] == 0
    with foreign_endpoint() as foreign:
        served.run(served.script(f"{sweep} {brief}", {"https://host/v1": foreign}))
    report = json.loads((served.folder / "loadtest-report" / "report.json").read_text())
    here, there = report["results"]
    assert (here["name"], there["name"]) == ("here", "there")
    assert here["points"][0]["failed"] == there["points"][0]["failed"] == 0
    assert here["points"][0]["stages_s"]
    assert here["points"][0]["server_good_share"] is not None
    assert there["points"][0]["server_good_share"] is None
    assert "<svg" in (served.folder / "loadtest-report" / "report.html").read_text()


def statistics(table: Path) -> dict[tuple[str, str], int]:
    with table.open() as lines:
        return {(row["Type"], row["Name"]): int(row["Request Count"]) for row in csv.DictReader(lines)}


def test_locust_counts_requests_once_and_tokens_beside_them(served: Served) -> None:
    [shown] = [each for each in blocks("sh") if "--html" in each.text]
    brief = {"-t 60s": f"-t 4s {SHORT}", "--ttft 4": "--ttft 60", "--tpot 0.25": "--tpot 60"}
    served.run(served.script(shown.text, brief))
    counts = statistics(served.folder / "out_stats.csv")
    requests = counts["POST", "/completions"]
    assert requests == counts["", "Aggregated"] > 0
    for method in ("TTFT", "TPOT", "GOOD"):
        assert counts[method, "/completions"] == requests
    assert counts["ITL", "/completions"] >= requests
    assert "/completions" in (served.folder / "out.html").read_text()


def test_locust_meets_at_the_master(served: Served) -> None:
    [shown] = [each for each in blocks("sh") if "--expect-workers" in each.text]
    port = free_port()
    ports = f"export LOCUST_MASTER_BIND_PORT={port} LOCUST_MASTER_NODE_PORT={port}\n"
    served.run(ports + served.script(shown.text, {"-t 60s": f"-t 4s {SHORT}"}) + "wait\n")
    counts = statistics(served.folder / "all_stats.csv")
    assert counts["POST", "/completions"] > 0
    assert counts["TTFT", "/completions"] == counts["POST", "/completions"]


def test_locust_draws_latency_in_the_browser(served: Served) -> None:
    [shown] = [each for each in blocks("sh") if each.text.rstrip().endswith("CompletionUser ChatUser")]
    port = free_port()
    command = served.script(shown.text).split()
    environment = {**served.environment, "LOCUST_WEB_PORT": str(port), "LOCUST_WEB_HOST": "127.0.0.1"}
    log = (served.folder / "locust.log").open("wb")
    with log, subprocess.Popen([*command, *SHORT.split()], cwd=served.folder, env=environment, stderr=log) as process:
        try:
            page = f"http://127.0.0.1:{port}"
            wait_for(lambda: answers(f"{page}/latency"), 30.0, (served.folder / "locust.log").read_text)
            start = urllib.parse.urlencode({"user_count": 4, "spawn_rate": 4, "host": served.url}).encode()
            urllib.request.urlopen(f"{page}/swarm", start, timeout=10).close()

            def drawn() -> set[str]:
                return {path for sample in get_json(f"{page}/latency/data") for path in sample["TTFT"]}

            wait_for(lambda: drawn() == {"/completions", "/chat/completions"}, 30.0, lambda: str(drawn()))
        finally:
            process.terminate()
            process.wait(STOP_S)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def test_what_is_not_run_is_still_there() -> None:
    for page, beginning in NOT_RUN:
        assert any(each.page == page and each.text.startswith(beginning) for each in blocks("sh")), (page, beginning)
