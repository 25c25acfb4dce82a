"""Every profile is valid for the API servers and custom resources that it goes to, and its rules hold what they say."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.chart import CHART, PROFILES, TOOLS, Object, objects, of_kind, template, tool

HERE = Path(__file__).parent
VERSIONS = ("1.30", "1.34", "1.37")
CUSTOM = {
    "HTTPRoute": "gateway.networking.k8s.io/v1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "ScaledObject": "keda.sh/v1alpha1",
}


def checked(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def kubernetes_validate(version: str, *files: Path) -> subprocess.CompletedProcess[str]:
    return checked([tool(TOOLS / "venv/bin/kubernetes-validate"), "-k", version, "--strict", *map(str, files)])


def written(folder: Path, *found: Object) -> Path:
    path = folder / "objects.yaml"
    path.write_text(yaml.safe_dump_all(found))
    return path


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_profile(version: str, tmp_path: Path) -> None:
    files = [tmp_path / f"{profile}.yaml" for profile in PROFILES]
    for profile, path in zip(PROFILES, files, strict=True):
        path.write_text(template(profile, "--kube-version", f"{version}.0"))
    done = kubernetes_validate(version, *files)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_misspelt_field_is_noticed(tmp_path: Path) -> None:
    service = of_kind("Service", objects("cpu-demo"))[0]
    done = kubernetes_validate("1.34", written(tmp_path, {**service, "spec": {**service["spec"], "typo": 1}}))
    assert done.returncode == 1
    assert "typo" in done.stdout + done.stderr


def validate_crds(path: Path) -> subprocess.CompletedProcess[str]:
    tool(TOOLS / "npm/node_modules/.bin/tsc")
    script = TOOLS / "npm" / "validate-crds.mjs"  # beside node_modules, where node looks for packages
    shutil.copy(CHART.parent / "tools" / script.name, script)
    return checked([tool("node"), str(script), str(path)])


def test_custom_resources_fit_their_definitions(tmp_path: Path) -> None:
    found = [one for one in objects("everything") if one["kind"] in CUSTOM]
    assert {one["kind"]: one["apiVersion"] for one in found} == CUSTOM
    done = validate_crds(written(tmp_path, *found))
    assert done.returncode == 0, done.stdout
    assert "skip" not in done.stdout


def test_a_wrong_custom_resource_is_noticed(tmp_path: Path) -> None:
    (scaled,) = of_kind("ScaledObject", objects("everything"))
    assert validate_crds(written(tmp_path, {**scaled, "spec": {"triggers": []}})).returncode == 1


def test_inference_pool_fits_its_definition(tmp_path: Path) -> None:
    """No package ships this one: the schema beside this file follows the resource's definition."""
    (pool,) = of_kind("InferencePool", objects("everything"))
    for object_, code in ((pool, 0), ({**pool, "spec": {"selector": {}}}, 1)):
        path = tmp_path / "pool.json"
        path.write_text(json.dumps(object_))
        done = checked([tool(TOOLS / "venv/bin/jsonschema"), "-i", str(path), str(HERE / "inferencepool.schema.json")])
        assert done.returncode == code, done.stderr


def test_rules_pass_promtool(tmp_path: Path) -> None:
    (rule,) = of_kind("PrometheusRule", objects("everything"))
    (tmp_path / "pdserve.yaml").write_text(yaml.safe_dump(rule["spec"]))
    shutil.copy(HERE / "rules_test.yaml", tmp_path)
    for command in (["check", "rules", "pdserve.yaml"], ["test", "rules", "rules_test.yaml"]):
        done = checked([tool("promtool"), *command], cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_and_a_runbook() -> None:
    groups = yaml.safe_load((CHART / "rules" / "pdserve.yaml").read_text())["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    tests = yaml.safe_load((HERE / "rules_test.yaml").read_text())["tests"]
    tested = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    page = (CHART.parent.parent / "docs" / "runbooks.md").read_text()
    for alert in alerts:
        assert alert["alert"] in tested
        assert f"## {alert['alert']}\n" in page
        assert alert["annotations"]["runbook_url"] == f"docs/runbooks.md#{alert['alert'].lower()}"
