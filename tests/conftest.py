"""Shared by all tests: the default model in its usual cache, and tiny random checkpoints made with transformers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# More OpenMP threads than free cores stall; before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pdserve.errors import ConfigError
from pdserve.launch.folders import cache_folder
from pdserve.models.default_model import ensure_default_model

# How long an example takes says more of the machine than of us.
settings.register_profile("pdserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pdserve")


@pytest.fixture(autouse=True, scope="session")
def _interrupts_count() -> None:
    """A shell that starts us in the background has interrupts ignored, for us and for all that we start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def model_cache() -> Path:
    """The cache that a user of this machine has: converting and packing are done once, not once a run."""
    return cache_folder()


@pytest.fixture(scope="session")
def default_model(model_cache: Path) -> Path:
    """The folder of SmolLM2-135M-Instruct; tests that need it are skipped offline, but never in CI."""
    try:
        return ensure_default_model(model_cache, lambda description, fraction: None)
    except ConfigError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a folder with config and random float32 weights, without a tokeniser.

    `family` is the prefix of transformers' class names (Qwen3, Gemma2, ...), keywords are its config's.
    """
    import torch
    import transformers

    made: dict[str, Path] = {}

    def make(family: str = "Llama", **overrides: Any) -> Path:
        key = json.dumps([family, overrides], sort_keys=True)
        if key in made:
            return made[key]
        small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        small |= {"num_key_value_heads": 2, "vocab_size": 131, "max_position_embeddings": 256}
        small |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # many lie outside this vocabulary
        config = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
        # The same weights whatever was made before. Some seeds bring a family to the edge of what float32 can hold.
        torch.manual_seed(int.from_bytes(blake2b(f"a{key}".encode(), digest_size=4).digest()))
        model = getattr(transformers, f"{family}ForCausalLM")(config(**{**small, **overrides}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Biases and norms differ from 0 and 1, or a missing one would go unnoticed.
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        return made.setdefault(key, folder)

    return make
