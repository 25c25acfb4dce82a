"""Runs the real supervisor over fake children: `python fake_fleet.py PORT BEHAVIOUR`. Not a test itself.

The worker announces and waits, the router is a small HTTP server, Redis is the real one.
BEHAVIOUR of the worker: `good`, `fails` (announces an error), `deaf` (ignores SIGTERM).
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from rich.console import Console

from pdserve.launch import supervisor
from pdserve.launch.child import Command
from pdserve.launch.plan import UpOptions
from pdserve.launch.steps import Steps

PREPARE = "announce(model='/models/tiny', kernels='fake')"
WORKERS = {
    "good": "print('worker', os.getpid(), flush=True); announce(address='h:1', admin_address='h:2'); signal.pause()",
    "fails": "print('its last words', flush=True); announce(error='The model is broken.'); sys.exit(1)",
    "deaf": "signal.signal(signal.SIGTERM, signal.SIG_IGN); announce(address='h:1'); signal.pause()",
}
ANNOUNCE = """
import json, os, signal, sys
def announce(**values):
    os.write(int(sys.argv[-1]), json.dumps(values).encode() + b"\\n")
"""
ROUTER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "tiny"}]}).encode())
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def fake(name: str, code: str, *arguments: str, announces: bool) -> Command:
    return Command(name, [sys.executable, "-c", code, *arguments], {}, announces)


def main() -> int:
    port, behaviour = int(sys.argv[1]), sys.argv[2]
    worker = fake("prefill-0", ANNOUNCE + WORKERS[behaviour], announces=True)
    supervisor.prepare_command = lambda options: fake("prepare", ANNOUNCE + PREPARE, announces=True)
    supervisor.worker_commands = lambda options, model, redis_url, store: [worker]
    supervisor.router_command = lambda options, model, redis_url: fake("router", ROUTER, str(port), announces=False)
    options = UpOptions(model=Path("/models/tiny"), port=port, host_bytes=0)
    return asyncio.run(supervisor.up(options, Steps(Console(highlight=False))))


if __name__ == "__main__":
    sys.exit(main())
