"""The Dockerfile passes hadolint and runs as the user that the chart asks for."""

from __future__ import annotations

import subprocess

import yaml

from tests.support.chart import CHART, ROOT, TOOLS, tool


def test_lint() -> None:
    done = subprocess.run(
        [tool(TOOLS / "venv/bin/hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_user_is_the_chart_s() -> None:
    uid = yaml.safe_load((CHART / "values.yaml").read_text())["pod"]["uid"]
    assert f"\nUSER {uid}:{uid}\n" in (ROOT / "Dockerfile").read_text()
