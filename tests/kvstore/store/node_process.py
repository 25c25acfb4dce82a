"""Real store nodes for tests: started with `python -m kvstore.store`, ready when they say so, ended by process id."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True)
class NodeProcess:
    process: subprocess.Popen[bytes]
    socket: str
    address: str
    admin_address: str

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


def start_node(folder: Path, *options: str, node_id: str = "node") -> NodeProcess:
    """A node whose socket lies in `folder`; 8 MiB of host memory unless `options` say otherwise."""
    reading, writing = os.pipe()
    command: Sequence[str] = (
        sys.executable,
        "-m",
        "kvstore.store",
        *("--socket", str(folder / f"{node_id}.sock"), "--node-id", node_id, "--ready-fd", str(writing)),
        *(() if "--host-bytes" in options else ("--host-bytes", "8MiB")),
        *options,
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / f"{node_id}.log").open("ab") as output:
        process = subprocess.Popen(command, pass_fds=(writing,), env=environment, stdout=output, stderr=output)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        line = pipe.readline()
    values = json.loads(line) if line else {"error": (folder / f"{node_id}.log").read_text()}
    if "error" in values:
        process.wait(10)
        raise RuntimeError(values["error"])
    return NodeProcess(process, values["socket"], values["address"], values["admin_address"])
