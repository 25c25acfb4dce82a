"""Writes the chart's README from the `## @param` lines of its values: `make docs`. A test fails when it is stale."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent.parent / "pdserve"
TARGET = CHART / "README.md"
HEAD = """# The pdserve chart

Generated from `values.yaml` (`make docs`). How to use it, and what it was tested with:
[docs/kubernetes.md](../../docs/kubernetes.md).

```
helm install demo helm/pdserve --set image.repository=REGISTRY/pdserve
```
"""


def default_of(values: dict[str, Any], key: str) -> str:
    found: Any = values
    for part in key.split("."):
        found = found[part]
    return json.dumps(found) if not isinstance(found, dict) or not found else ""


def render() -> str:
    text = (CHART / "values.yaml").read_text()
    values = yaml.safe_load(text)
    parts = [HEAD]
    for line in text.splitlines():
        if line.startswith("## @section "):
            title = line.removeprefix("## @section ")
            parts.append(f"\n## {title}\n\n| value | default | meaning |\n|---|---|---|\n")
        elif line.startswith("## @param "):
            key, _, meaning = line.removeprefix("## @param ").partition(" ")
            default = default_of(values, key)
            parts.append(f"| `{key}` | {f'`{default}`' if default else ''} | {meaning} |\n")
    return "".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text() == render() else "the chart's README is stale: run make docs")
    TARGET.write_text(render())
