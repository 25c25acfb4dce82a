"""The Helm chart as rendered objects, and the tools that render and check it (`make helm-tools` installs them)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "helm" / "pdserve"
TOOLS = ROOT / ".tools"
PROFILES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
HELMS = {"helm3": TOOLS / "bin" / "helm", "helm4": TOOLS / "helm4" / "helm"}
ROLES = ("prefill", "decode", "mixed")

Object = dict[str, Any]


def tool(path: Path | str) -> str:
    """A missing tool skips the test on a developer's machine and fails it in continuous integration."""
    found = shutil.which(path)
    if found is None:
        message = f"{path} is missing: make helm-tools"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return found


def values_file(profile: str) -> Path:
    return CHART / "ci" / f"{profile}-values.yaml"


def template(profile: str, *arguments: str, helm: str = "helm3", release: str = "rel") -> str:
    """The profile as YAML. `arguments` go to `helm template`."""
    command = [tool(HELMS[helm]), "template", release, str(CHART), "--namespace", "serving"]
    command += ["-f", str(values_file(profile)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


@cache
def objects(profile: str, *arguments: str, release: str = "rel") -> list[Object]:
    return [found for found in yaml.safe_load_all(template(profile, *arguments, release=release)) if found]


def of_kind(kind: str, found: list[Object]) -> list[Object]:
    return [one for one in found if one["kind"] == kind]


def pod_templates(found: list[Object]) -> Iterator[tuple[str, Object]]:
    """Name of the object, and its pod with `metadata` and `spec`."""
    for one in found:
        if one["kind"] in ("Deployment", "DaemonSet"):
            yield one["metadata"]["name"], one["spec"]["template"]
        elif one["kind"] == "Pod":
            yield one["metadata"]["name"], one


def component(one: Object) -> str:
    return str(one["metadata"]["labels"]["app.kubernetes.io/component"])
