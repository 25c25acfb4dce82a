"""A small HTTP server for commands that talk to one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class FakeServer:
    """Answers GET from `pages` (path to JSON; a number is a bare status) and POST with `stream`, piece by piece.

    Attributes:
        stream: bytes written one after the other; None waits until the client has gone.
        bodies: the JSON of each POST.
        headers: of each GET.
        client_gone: set when a client went away while the stream waited.
    """

    def __init__(self) -> None:
        self.pages: dict[str, Any] = {"/v1/models": {"data": [{"id": "tiny"}]}}
        self.stream: list[bytes | None] = []
        self.status = 200
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.client_gone = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                fake.headers.append(dict(self.headers))
                page = fake.pages.get(self.path, 404)
                self.send_response(page if isinstance(page, int) else 200)
                self.end_headers()
                if not isinstance(page, int):
                    self.wfile.write(json.dumps(page).encode())

            def do_POST(self) -> None:
                fake.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(fake.status)
                self.end_headers()
                for piece in fake.stream:
                    if piece is None:
                        self.connection.settimeout(20)
                        if not self.connection.recv(1):
                            fake.client_gone.set()
                    else:
                        self.wfile.write(piece)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


@pytest.fixture
def other_server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()
