"""An OpenAI-compatible server that is not ours: it knows no header, no field and no page beyond OpenAI's."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "foreign"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._reply("application/json", json.dumps({"object": "list", "data": [{"id": MODEL}]}).encode())
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == MODEL
        event = json.dumps({"object": "text_completion", "choices": [{"index": 0, "text": " word"}]})
        self._reply("text/event-stream", (f"data: {event}\n\n" * body["max_tokens"] + "data: [DONE]\n\n").encode())

    def _reply(self, kind: str, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """To nobody."""


@contextlib.contextmanager
def foreign_endpoint() -> Iterator[str]:
    """Its address, as in `http://127.0.0.1:PORT/v1`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
