"""What the chart renders: commands that the real command line takes, pods that are confined, names that agree."""

from __future__ import annotations

import base64
import importlib
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import typer
import yaml

from router.admission import Mode
from tests.support.chart import (
    CHART,
    HELMS,
    PROFILES,
    ROLES,
    Object,
    component,
    objects,
    of_kind,
    pod_templates,
    template,
    tool,
    values_file,
)

MODULES = {"router": "router.__main__", "worker": "pdserve.worker.__main__", "store": "kvstore.store.__main__"}
LONG = "a-release-whose-name-is-as-long-as-helm-allows-it-12"


def parse(arguments: list[str]) -> dict[str, Any]:
    """The parameters that the real command makes of a container's `args`. Raises typer's usage error."""
    command = typer.Typer(add_completion=False)
    main: Callable[..., None] = importlib.import_module(MODULES[arguments[0]]).main
    command.command()(main)
    found = [one.replace("$(POD_NAME)", "pod-0").replace("$(POD_IP)", "10.0.0.1") for one in arguments[1:]]
    context = typer.main.get_command(command).make_context(arguments[0], found)
    return dict(context.params)


@pytest.mark.parametrize("profile", PROFILES)
def test_commands_are_ones_that_the_command_line_takes(profile: str) -> None:
    parsed = 0
    for name, pod in pod_templates(objects(profile)):
        for container in pod["spec"]["containers"]:
            if container["name"] not in MODULES:
                continue
            parameters = parse(container["args"])
            parsed += 1
            assert parameters["namespace"] == "rel-pdserve"
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            if container["name"] == "worker":
                assert parameters["role"].value == name.removeprefix("rel-pdserve-")
            assert ports == (
                {"http": parameters["port"]}
                if container["name"] == "router"
                else {"rpc": parameters["port"], "admin": parameters["admin_port"]}
            )
    assert parsed >= 2


def test_a_wrong_option_is_noticed() -> None:
    with pytest.raises(Exception, match="no-such-option"):
        parse(["worker", "--model=/m", "--no-such-option=1"])


@pytest.mark.parametrize("profile", PROFILES)
def test_containers_are_confined(profile: str) -> None:
    for name, pod in pod_templates(objects(profile)):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec.get("hostNetwork")
        assert not spec.get("hostIPC")
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["capabilities"]["drop"] == ["ALL"], name
            if container["name"] != "own-folders":
                assert "runAsUser" not in context
            assert container["resources"]["requests"]
            assert container["resources"]["limits"]
            assert not container["image"].endswith((":latest", ":"))
            mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
            assert mounts <= {volume["name"] for volume in spec.get("volumes", ())}


def test_memory_is_locked_only_for_rdma() -> None:
    for profile in PROFILES:
        for name, pod in pod_templates(objects(profile)):
            for container in pod["spec"]["containers"]:
                added = container["securityContext"]["capabilities"].get("add", [])
                wanted = profile in ("gpu-rdma", "everything") and container["name"] == "worker"
                assert added == (["IPC_LOCK"] if wanted else []), name
                if wanted:
                    resources = container["resources"]
                    for resource in ("rdma/ib", "nvidia.com/gpu"):
                        assert resources["requests"].get(resource) == resources["limits"].get(resource)
                    assert resources["limits"]["rdma/ib"] == 1


@pytest.mark.parametrize("profile", PROFILES)
def test_grace_outlasts_the_drain(profile: str) -> None:
    for _, pod in pod_templates(objects(profile)):
        for container in pod["spec"]["containers"]:
            if "lifecycle" not in container:
                continue
            sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            drain_s = parse(container["args"])["drain_s"] if container["name"] == "router" else 30
            assert pod["spec"]["terminationGracePeriodSeconds"] > sleep_s + drain_s


@pytest.mark.parametrize("profile", PROFILES)
def test_long_running_containers_have_probes_on_their_ports(profile: str) -> None:
    for name, pod in pod_templates(objects(profile)):
        if name.endswith("-test"):
            continue
        for container in pod["spec"]["containers"]:
            ports = {port["name"] for port in container["ports"]}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                asked = container[probe].get("httpGet") or container[probe]["tcpSocket"]
                assert asked["port"] in ports, name


@pytest.mark.parametrize("profile", PROFILES)
def test_ports_of_policies_and_monitors_exist(profile: str) -> None:
    found = objects(profile)
    ports = {
        component({"metadata": pod["metadata"]}): {
            port["name"] for c in pod["spec"]["containers"] for port in c.get("ports", ())
        }
        for _, pod in pod_templates(found)
    }
    for policy in of_kind("NetworkPolicy", found):
        name = policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        for rule in policy["spec"]["ingress"]:
            for port in rule["ports"]:
                assert name not in ports or not isinstance(port["port"], str) or port["port"] in ports[name]
    for monitor in of_kind("PodMonitor", found):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert endpoint["port"] in ports.get(component(monitor), {endpoint["port"]})


def test_what_one_side_may_call_the_other_side_takes() -> None:
    """Each plane between our own components: every egress rule has an ingress rule of the same ports, and none more."""
    found = objects("everything", "--set", "networkPolicy.monitoring=null")
    ports = {
        component({"metadata": pod["metadata"]}): {
            port["name"]: port["containerPort"] for c in pod["spec"]["containers"] for port in c.get("ports", ())
        }
        for _, pod in pod_templates(found)
    }
    sends: set[tuple[str, str, int, int]] = set()
    takes: set[tuple[str, str, int, int]] = set()
    for policy in of_kind("NetworkPolicy", found):
        own = policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        for direction, side, pairs in (("egress", "to", sends), ("ingress", "from", takes)):
            for rule in policy["spec"].get(direction, ()):
                others = [
                    name
                    for peer in rule.get(side, ())
                    for match in peer.get("podSelector", {}).get("matchExpressions", ())
                    for name in match["values"]
                ]
                for other in others:
                    for port in rule["ports"]:
                        first = port["port"] if isinstance(port["port"], int) else ports[own][port["port"]]
                        pair = (own, other) if direction == "egress" else (other, own)
                        pairs.add((*pair, first, port.get("endPort", first)))
    takes = {each for each in takes if each[0] != "test"}  # which may call whatever it likes
    assert sends == takes
    assert {(a, b) for a, b, _, _ in sends} >= {("router", "prefill"), ("prefill", "decode"), ("store", "store")}


@pytest.mark.parametrize("profile", PROFILES)
def test_every_pod_of_ours_has_a_policy(profile: str) -> None:
    found = objects(profile)
    chosen = {
        p["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for p in of_kind("NetworkPolicy", found)
    }
    serving = {component({"metadata": pod["metadata"]}) for _, pod in pod_templates(found)} - {"test"}
    assert serving <= chosen


def test_selectors_hold_nothing_that_a_user_edits() -> None:
    """A selector cannot be changed later: these three labels are what every release so far was installed with."""
    edited = objects("everything", "--set", "pod.labels.more=x", "--set", "image.tag=9.9.9")
    for one in [*of_kind("Deployment", edited), *of_kind("DaemonSet", edited)]:
        assert one["spec"]["selector"]["matchLabels"] == {
            "app.kubernetes.io/name": "pdserve",
            "app.kubernetes.io/instance": "rel",
            "app.kubernetes.io/component": component(one),
        }


def test_names_fit_with_a_long_release_name() -> None:
    for one in objects("everything", release=LONG):
        assert len(one["metadata"]["name"]) <= 63


def test_replicas_are_left_to_the_autoscaler() -> None:
    found = {one["metadata"]["name"]: one["spec"] for one in of_kind("Deployment", objects("everything"))}
    for name in ("router", "prefill", "decode"):
        assert "replicas" not in found[f"rel-pdserve-{name}"]
    assert found["rel-pdserve-mixed"]["replicas"] == 1
    (scaled,) = of_kind("ScaledObject", objects("everything"))
    assert scaled["spec"]["triggers"][0]["metadata"]["query"] == (
        'sum(pdserve_queue_tokens{namespace="serving", waits_for="prefill"}'
        ' or pdserve_router_backlog_tokens{namespace="serving", role="prefill"})'
    )


def test_decode_is_scaled_by_its_pools_and_by_what_waits_for_it() -> None:
    found = objects("everything", "--set", "workers.decode.autoscaling.kind=keda")
    decode = next(one for one in of_kind("ScaledObject", found) if component(one) == "decode")
    asked = {trigger["metadata"]["query"]: trigger["metadata"]["threshold"] for trigger in decode["spec"]["triggers"]}
    assert asked == {
        'sum(pdserve_kv_usage_ratio{namespace="serving", component="decode"})': "0.8",
        '(count(pdserve_kv_usage_ratio{namespace="serving", component="decode"}) + 1)'
        ' * (sum(pdserve_queue_requests{namespace="serving", waits_for="decode"}) > bool 0)': "1",
    }
    names = set(re.findall(r"pdserve_\w+", " ".join(asked)))
    assert names <= set(re.findall(r"`(pdserve_\w+)`", (CHART.parent.parent / "METRICS.md").read_text()))


def test_prefill_on_an_hpa_reads_the_backlog_of_the_routers() -> None:
    found = objects("everything", "--set", "workers.prefill.autoscaling.kind=hpa")
    prefill = next(
        one for one in of_kind("HorizontalPodAutoscaler", found) if one["metadata"]["name"].endswith("-prefill")
    )
    (metric,) = prefill["spec"]["metrics"]
    assert metric["external"]["metric"]["name"] == "pdserve_prefill_backlog_tokens"


def test_what_is_off_renders_nothing() -> None:
    kinds = {one["kind"] for one in objects("cpu-demo")}
    off = {"DaemonSet", "PodMonitor", "PrometheusRule", "ConfigMap", "HTTPRoute", "InferencePool", "ScaledObject"}
    assert not kinds & (off | {"HorizontalPodAutoscaler", "Role", "RoleBinding"})
    assert not of_kind("Secret", objects("external-redis"))


@pytest.mark.parametrize("profile", PROFILES)
def test_secrets_stay_out_of_arguments(profile: str) -> None:
    found = objects(profile)
    secrets = of_kind("Secret", found)
    for secret in secrets:
        encoded = secret["data"]["password"]
        for hidden in (encoded, base64.b64decode(encoded).decode()):
            assert not any(hidden in str(one) for one in found if one is not secret)
    for _, pod in pod_templates(found):
        for container in pod["spec"]["containers"]:
            names = {entry["name"] for entry in container.get("env", ())}
            assert "HF_TOKEN" not in names
            if container["name"] in MODULES:
                assert "PDSERVE_REDIS_URL" in names


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("router.replicas=x", "replicas"),
        ("workers.prefill.typo=1", "typo"),
        ("model.source=s3://x", "source"),
        ("redis.enabled=false", "external.existingSecret"),
        ("gateway.inferencePool.enabled=true", "endpointPicker"),
        ("security.tenantsSecret=x", "adminKey"),
        ("workers.prefill.replicas=0,workers.decode.replicas=0", "0 replicas"),
    ],
)
def test_wrong_values_are_refused_with_their_name(setting: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        template("cpu-demo", "--set", setting)


@pytest.mark.parametrize("mode", [mode.value for mode in Mode])
def test_the_router_takes_each_admission_mode(mode: str) -> None:
    found = list(yaml.safe_load_all(template("cpu-demo", "--set-string", f"router.admission={mode}")))
    [router] = [pod for name, pod in pod_templates(found) if name == "rel-pdserve-router"]
    assert parse(router["spec"]["containers"][0]["args"])["admission"] == mode


def test_workers_and_store_of_a_node_share_files_and_process_ids() -> None:
    found = dict(pod_templates(objects("everything")))
    shared = [
        {volume["name"]: volume.get("hostPath") for volume in found[f"rel-pdserve-{name}"]["spec"]["volumes"]}
        for name in ("store", *ROLES)
    ]
    assert shared[0]["shm"]["path"] == "/dev/shm/pdserve-serving-rel-pdserve"
    assert all(one["shm"] == shared[0]["shm"] and one["store"] == shared[0]["store"] for one in shared)
    assert all(found[f"rel-pdserve-{name}"]["spec"]["hostPID"] for name in ("store", *ROLES))


def test_the_admin_key_reaches_the_router_as_a_file() -> None:
    pod = dict(pod_templates(objects("everything")))["rel-pdserve-router"]["spec"]
    (router,) = (one for one in pod["containers"] if one["name"] == "router")
    (volume,) = (one for one in pod["volumes"] if one["name"] == "admin-key")
    (mount,) = (one for one in router["volumeMounts"] if one["name"] == "admin-key")
    assert volume["secret"]["secretName"] == "operators"
    assert parse(router["args"])["admin_key_file"].is_relative_to(mount["mountPath"])


def test_series_without_a_model_get_the_models_name() -> None:
    """And those of vLLM's names keep their own."""
    for monitor in of_kind("PodMonitor", objects("everything")):
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["metricRelabelings"] == [
            {
                "sourceLabels": ["model_name"],
                "regex": "^$",
                "targetLabel": "model_name",
                "replacement": "Llama-3.2-1B-Instruct",
            }
        ]


def test_route_leads_to_the_pool() -> None:
    (pool,), (route,) = (of_kind(kind, objects("everything")) for kind in ("InferencePool", "HTTPRoute"))
    assert route["spec"]["rules"][0]["backendRefs"][0]["name"] == pool["metadata"]["name"]


def test_every_value_is_described_and_in_the_schema() -> None:
    text = (CHART / "values.yaml").read_text()
    described = {line.split()[2] for line in text.splitlines() if line.startswith("## @param")}
    values: Object = yaml.safe_load(text)
    for key in described:
        found: Any = values
        for part in key.split("."):
            assert part in found, key
            found = found[part]
    for section, found in values.items():
        assert any(name.split(".")[0] == section for name in described), section
        assert isinstance(found, dict)


@pytest.mark.parametrize("profile", PROFILES)
def test_both_helms_render_the_same(profile: str) -> None:
    """But for the random password."""
    arguments = ("--set", "redis.enabled=false", "--set", "redis.external.existingSecret=x")
    first, second = (list(yaml.safe_load_all(template(profile, *arguments, helm=helm))) for helm in HELMS)
    assert first == second


@pytest.mark.parametrize("profile", PROFILES)
def test_lint(profile: str) -> None:
    for helm in HELMS.values():
        command = [tool(helm), "lint", "--strict", str(CHART), "-f", str(values_file(profile))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_keys_and_certificates_are_mounted_from_their_secrets_where_they_are_needed() -> None:
    found = dict(pod_templates(objects("everything")))
    for name in ("router", "store", *ROLES):
        spec = found[f"rel-pdserve-{name}"]["spec"]
        container = next(one for one in spec["containers"] if one["name"] in MODULES)
        secrets = {volume["name"]: volume["secret"] for volume in spec["volumes"] if "secret" in volume}
        folders = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        environment = {each["name"]: each.get("value", "") for each in container["env"]}
        wanted = {"PDSERVE_TLS_DIR": "certificates"}
        if name == "router":
            wanted["PDSERVE_TENANTS_FILE"] = "tenants"
        for variable, secret in wanted.items():
            path = environment[variable]
            folder = next(each for each in folders if path.startswith(each) and each.startswith("/etc"))
            assert secrets[folders[folder]]["secretName"] == secret
            assert not secrets[folders[folder]]["defaultMode"] & 0o007, "others read it, which the processes refuse"
        assert secrets.keys() - {"admin-key"} == {"tls", *(("tenants",) if name == "router" else ())}
    for _, pod in pod_templates(objects("cpu-demo")):
        assert not {"tls", "tenants", "admin-key"} & {volume["name"] for volume in pod["spec"].get("volumes", ())}


def test_prometheus_shows_the_admin_key_to_routers_alone() -> None:
    for monitor in of_kind("PodMonitor", objects("everything")):
        [endpoint] = monitor["spec"]["podMetricsEndpoints"]
        key = {"credentials": {"name": "operators", "key": "admin-key"}}
        assert endpoint.get("authorization") == (key if component(monitor) == "router" else None)
