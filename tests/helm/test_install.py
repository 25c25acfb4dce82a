"""A release lives: installed, upgraded, rolled back, uninstalled by helm 3 and 4, without a real cluster."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.chart import CHART, HELMS, ROOT, tool, values_file

SERVER = ROOT / "tests" / "support" / "fake_kubernetes.py"
KUBECONFIG = """apiVersion: v1
kind: Config
clusters: [{{name: fake, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
contexts: [{{name: fake, context: {{cluster: fake, user: nobody}}}}]
current-context: fake
users: [{{name: nobody, user: {{}}}}]
"""


@dataclass(frozen=True)
class Cluster:
    folder: Path
    helm_binary: str
    kubectl_binary: str

    def run(self, *command: str) -> str:
        places = {name: str(self.folder / name) for name in ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME")}
        environment = {**os.environ, **places, "KUBECONFIG": str(self.folder / "config"), "HOME": str(self.folder)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def helm(self, *arguments: str) -> str:
        return self.run(self.helm_binary, *arguments)

    def release(self, verb: str, *arguments: str) -> str:
        """The server describes no fields, so helm must not ask it to check them; test_schemas does."""
        values = ["-f", str(values_file("everything")), "--disable-openapi-validation", "--timeout", "20s"]
        return self.helm(verb, "r", str(CHART), *values, *arguments)

    def get(self, kind: str, name: str, path: str) -> str:
        return self.run(self.kubectl_binary, "get", kind, name, "-o", f"jsonpath={{{path}}}")


@pytest.fixture(params=HELMS)
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    helm = tool(HELMS[request.param])
    kubectl = tool(HELMS[request.param].with_name("kubectl"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "config").write_text(KUBECONFIG.format(port=port))
    with subprocess.Popen([sys.executable, str(SERVER), str(port), "240"], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield Cluster(tmp_path, helm, kubectl)
        finally:
            server.kill()


def test_install_upgrade_rollback_uninstall(cluster: Cluster) -> None:
    assert "STATUS: deployed" in cluster.release("install")
    password = cluster.get("secret", "r-pdserve-redis", ".data.password")
    selector = cluster.get("deployment", "r-pdserve-mixed", ".spec.selector")
    assert cluster.get("deployment", "r-pdserve-mixed", ".spec.replicas") == "1"
    cluster.release("upgrade", "--set", "workers.mixed.replicas=3", "--set", "pod.labels.team=other")
    assert cluster.get("deployment", "r-pdserve-mixed", ".spec.replicas") == "3"
    assert cluster.get("deployment", "r-pdserve-mixed", ".spec.selector") == selector
    assert cluster.get("secret", "r-pdserve-redis", ".data.password") == password, "running pods would be locked out"
    cluster.helm("rollback", "r", "1", "--timeout", "20s")
    assert cluster.get("deployment", "r-pdserve-mixed", ".spec.replicas") == "1"
    statuses = [entry["status"] for entry in json.loads(cluster.helm("history", "r", "-o", "json"))]
    assert statuses == ["superseded", "superseded", "deployed"]
    cluster.helm("uninstall", "r")
    kinds = "deployments,daemonsets,services,secrets,configmaps"
    left = cluster.run(cluster.kubectl_binary, "get", kinds, "-o", "name")
    assert left == ""
