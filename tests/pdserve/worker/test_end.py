"""The end of a worker's process while a step runs that does not end in time."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import asyncio, types
import torch
from pdserve.worker.engine_thread import EngineThread, end_process_in_a_step

torch.set_num_threads(1)

async def main():
    loop, began = asyncio.get_running_loop(), asyncio.Event()
    runner = types.SimpleNamespace(enter_thread=lambda: None)
    thread = EngineThread(types.SimpleNamespace(idle=True, in_flight=False, runner=runner), loop)

    def step(engine, now_s):
        loop.call_soon_threadsafe(began.set)
        numbers = torch.zeros(1024, 1024)
        while True:
            numbers @ numbers

    thread.start(None)
    thread.post(step)
    await began.wait()
    await thread.stop(0.1)

asyncio.run(main())
end_process_in_a_step()
"""


def test_is_no_crash() -> None:
    """The thread is in C++ code then, and an interpreter that ends beside it aborts."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
