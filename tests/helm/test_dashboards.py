"""Dashboards are fresh, fit Grafana's own types, and ask only for metrics that the code exports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.chart import CHART, ROOT, TOOLS, tool

BOARDS = sorted((CHART / "dashboards").glob("*.json"))
RULES = CHART / "rules" / "pdserve.yaml"
METRIC = re.compile(r"\bpdserve_\w+")


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (panel for panel in board["panels"] if panel["type"] != "row")


def exprs(path: Path) -> list[str]:
    return [target["expr"] for panel in panels(json.loads(path.read_text())) for target in panel["targets"]]


def exported() -> set[str]:
    """Every series name of METRICS.md, which another test holds equal to the code."""
    found = set()
    for line in (ROOT / "METRICS.md").read_text().splitlines():
        if match := re.match(r"\| `(pdserve_\w+)` \| (\w+) ", line):
            name, kind = match.groups()
            found |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return found


@pytest.mark.parametrize("script", ["make_dashboards.py", "make_readme.py"])
def test_generated_files_are_fresh(script: str) -> None:
    command = [sys.executable, str(CHART.parent / "tools" / script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_there_is_something_to_check() -> None:
    assert {path.stem for path in BOARDS} == {"overview", "pipeline", "cache", "loadtest"}
    assert len(exported()) > 50


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_metrics_exist(path: Path) -> None:
    for expr in exprs(path):
        names = set(METRIC.findall(expr))
        assert names, expr
        assert names <= exported(), expr


def test_metrics_of_the_rules_exist() -> None:
    names = set(METRIC.findall(RULES.read_text()))
    assert names <= exported()


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_queries_parse(path: Path, tmp_path: Path) -> None:
    """As expressions of recording rules, which promtool reads with Prometheus's own parser."""
    rules = [
        {"record": f"panel:{number}", "expr": expr.replace("$__rate_interval", "1m")}
        for number, expr in enumerate(exprs(path))
    ]
    (tmp_path / "rules.json").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))  # JSON is YAML
    done = subprocess.run(
        [tool("promtool"), "check", "rules", "rules.json"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_panels_follow_the_rules_of_the_house(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"] == f"pdserve-{path.stem}"
    assert board["graphTooltip"] == 1
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in panels(board):
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert target["legendFormat"]
            assert target["expr"].count('namespace=~"$namespace"') == len(METRIC.findall(target["expr"]))
            assert "rate(" not in target["expr"] or "[$__rate_interval]" in target["expr"]


def type_check(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    compiler = tool(TOOLS / "npm/node_modules/.bin/tsc")
    (folder / "node_modules").symlink_to(TOOLS / "npm" / "node_modules")
    source = f'import type {{ Dashboard }} from "@grafana/schema";\nexport const board: Dashboard = {text};\n'
    (folder / "board.ts").write_text(source)
    options = {"strict": True, "noEmit": True, "module": "nodenext", "moduleResolution": "nodenext"}
    options |= {"target": "es2022", "skipLibCheck": True}
    (folder / "tsconfig.json").write_text(json.dumps({"compilerOptions": options, "files": ["board.ts"]}))
    return subprocess.run([compiler, "-p", str(folder)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_grafana_knows_every_field(path: Path, tmp_path: Path) -> None:
    done = type_check(path.read_text(), tmp_path)
    assert done.returncode == 0, done.stdout


def test_a_wrong_field_is_noticed(tmp_path: Path) -> None:
    done = type_check(BOARDS[0].read_text().replace('"graphTooltip": 1', '"graphTooltip": "1"'), tmp_path)
    assert done.returncode != 0
    assert "not assignable" in done.stdout
