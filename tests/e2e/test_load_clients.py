"""Other people's clients run unmodified: those of `$PDSERVE_CLIENTS`, a folder of virtual environments.

Each environment has the name of its package (`python -m venv aiperf && aiperf/bin/pip install aiperf`). They are heavy
and bring versions of their own, so CI has none of them: docs/api.md says what was run, and which versions.
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

LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

class City(BaseModel):
    name: str

server = {"base_url": sys.argv[1], "api_key": "unused", "model": sys.argv[2], "temperature": 0, "max_tokens": 20}
chat = ChatOpenAI(**server)
whole = chat.invoke("What is gravity?").content
assert whole == "".join(chunk.content for chunk in chat.stream("What is gravity?"))
assert chat.batch(["Hi", "What is rain?"])[1].usage_metadata["output_tokens"] > 0
assert chat.with_structured_output(City, method="json_schema").invoke("Name a city as JSON.").name
assert chat.bind(logprobs=True, top_logprobs=2).invoke("Hi").response_metadata["logprobs"]["content"]
assert ChatOpenAI(**server, use_responses_api=True, store=False).invoke("What is gravity?").content
assert OpenAI(**server).invoke("The capital of Italy is")
"""


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


def test_langchain(disaggregated: Stack, tmp_path: Path) -> None:
    python = program("langchain-openai", "python")
    run(python, "-c", LANGCHAIN, f"{disaggregated.url}/v1", disaggregated.model.name, cwd=tmp_path)


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
