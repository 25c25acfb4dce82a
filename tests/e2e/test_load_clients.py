"""Other people's clients run unmodified: those of `$PDSERVE_CLIENTS`, a folder of virtual environments.

Each environment has the name of its package (`python -m venv aiperf && aiperf/bin/pip install aiperf`; inference-perf
needs Python 3.12). They are heavy and bring versions of their own, so CI has none of them: docs/api.md says what was
run, and which versions.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.stack import Stack

pytestmark = pytest.mark.e2e

CLIENTS = Path(os.environ.get("PDSERVE_CLIENTS", "/nonexistent"))
TIMEOUT_S = 240


def program(package: str, name: str) -> str:
    path = CLIENTS / package / "bin" / name
    if not path.exists():
        pytest.skip(f"{package} is not in $PDSERVE_CLIENTS")
    return str(path)


def run(*arguments: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=cwd, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def hub_cache(stack: Stack, folder: Path) -> dict[str, str]:
    """The served model's tokeniser where these look for it, under the name `local/model`, with no hub to ask."""
    at = folder / "hub" / "models--local--model"
    (at / "refs").mkdir(parents=True)
    (at / "refs" / "main").write_text("0")
    (at / "snapshots" / "0").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stack.model / name, at / "snapshots" / "0")
    return {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}


def test_aiperf(disaggregated: Stack, tmp_path: Path) -> None:
    command = [program("aiperf", "aiperf"), "profile", "--model", disaggregated.model.name, "--url", disaggregated.url]
    command += ["--endpoint-type", "chat", "--streaming", "--concurrency", "2", "--request-count", "6", "--ui", "none"]
    command += ["--synthetic-input-tokens-mean", "50", "--output-tokens-mean", "16", "--tokenizer", "local/model"]
    run(*command, "--artifact-dir", "out", cwd=tmp_path, **hub_cache(disaggregated, tmp_path))
    [report] = tmp_path.glob("out/**/profile_export_aiperf.json")
    told = json.loads(report.read_text())
    assert told["request_count"]["avg"] == 6
    assert told["time_to_first_token"]["avg"] > 0


def test_guidellm(disaggregated: Stack, tmp_path: Path) -> None:
    command = [program("guidellm", "guidellm"), "run", "--disable-console-interactive"]
    command += ["--backend", f"kind=openai_http,target={disaggregated.url},model={disaggregated.model.name}"]
    command += ["--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=4"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=50,output_tokens=16"]
    command += ["--tokenizer", "kind=hf_auto,model=local/model", "--output", "kind=json,path=out.json"]
    run(*command, cwd=tmp_path, **hub_cache(disaggregated, tmp_path))
    [told] = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert not told["requests"]["errored"]
    assert told["requests"]["successful"]


@pytest.mark.parametrize("api", ["completion", "chat"])
def test_inference_perf(disaggregated: Stack, tmp_path: Path, api: str) -> None:
    lengths = {"min": 20, "max": 50, "mean": 30, "std_dev": 5, "total_count": 10}
    shared = {
        "num_groups": 2,
        "num_prompts_per_group": 3,
        "system_prompt_len": 40,
        "question_len": 20,
        "output_len": 12,
    }
    random = {"type": "random", "input_distribution": lengths, "output_distribution": lengths | {"min": 4, "mean": 12}}
    config = {
        "load": {"type": "constant", "num_workers": 1, "stages": [{"rate": 1, "duration": 5}]},
        "api": {"type": api, "streaming": True},
        "server": {"type": "vllm", "model_name": disaggregated.model.name, "base_url": disaggregated.url},
        "tokenizer": {"pretrained_model_name_or_path": "local/model"},
        "data": random if api == "completion" else {"type": "shared_prefix", "shared_prefix": shared},
        "storage": {"local_storage": {"path": "out"}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))  # which is YAML too
    command = [program("inference-perf", "inference-perf"), "-c", "config.json"]
    run(*command, cwd=tmp_path, **hub_cache(disaggregated, tmp_path))
    told = json.loads((tmp_path / "out" / "summary_lifecycle_metrics.json").read_text())
    assert told["successes"]["count"] == 5
    assert told["failures"]["count"] == 0
