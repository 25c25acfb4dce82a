"""A policy of one's own is an installed package with an entry point; the documentation's is one, and a broken one hurts
nobody."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ASK = """
import json
from router.policy import POLICIES
print(json.dumps({name: policy.name for name, policy in POLICIES.items()}))
"""


def install(folder: Path, points: str) -> None:
    """As a package manager leaves it behind."""
    about = folder / "mine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(points)


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_policy_of_the_documentation_is_found_and_chooses(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n# my_policies\.py\n(.*?)```", (REPOSITORY / "docs/routing.md").read_text(), re.S)
    [point] = re.findall(r'"pdserve\.policies"\]\n(\w+) = "([\w:]+)"', (REPOSITORY / "docs/routing.md").read_text())
    (tmp_path / "my_policies.py").write_text(code)
    install(tmp_path, f"[pdserve.policies]\n{point[0]} = {point[1]}\n")
    assert len(code.strip().splitlines()) <= 10
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]}\n' * 3)
    replayed = run(tmp_path, sys.executable, "-m", "router.replay", str(trace), "--policy", point[0], "--json")
    assert replayed.returncode == 0, replayed.stderr
    [outcome] = json.loads(replayed.stdout)
    assert (outcome["policy"], outcome["requests"], outcome["failed"]) == ("emptiest", 3, 0)


def test_one_that_cannot_be_used_is_left_out_and_said_so(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text("from router.policy.policies import Policy\nnumber = 7\nmine = Policy('else')\n")
    install(
        tmp_path,
        "[pdserve.policies]\nnumber = odd:number\nabsent = nowhere:policy\ncost = odd:mine\nnamed = odd:mine\n",
    )
    asked = run(tmp_path, sys.executable, "-c", ASK)
    found = json.loads(asked.stdout)
    assert found["named"] == "named"  # its records bear the name that it is chosen by
    assert found["cost"] == "cost"
    assert not {"number", "absent"} & found.keys()
    for name in ("number", "absent", "cost"):
        assert f"policy {name} from" in asked.stderr
