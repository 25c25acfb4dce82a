"""`pdserve models` lists every table that decides what can be served."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from pdserve.cli import app
from pdserve.models.families import FAMILIES
from pdserve.models.gguf_types import TENSOR_TYPES
from pdserve.models.rope_config import ROPE_KINDS


def test_the_list_is_whole() -> None:
    listed = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)
    assert list(listed["families"]) == list(FAMILIES)
    assert list(listed["rotations"]) == list(ROPE_KINDS)
    text = CliRunner().invoke(app, ["models"]).stdout
    for word in (*FAMILIES, *ROPE_KINDS, *TENSOR_TYPES, "head_dim", "mixture of experts"):
        assert word in text
