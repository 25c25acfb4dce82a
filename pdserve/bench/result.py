"""How a benchmark tells what it found: JSON on the terminal, and in a file if one is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def tell(result: Mapping[str, object], file: Path | None) -> None:
    text = json.dumps(result, indent=2)
    print(text)
    if file is not None:
        file.write_text(text + "\n")
