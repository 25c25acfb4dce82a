"""Sends one request and reads its stream, as a coroutine (the sweep) or blocking (locust users, whose sockets gevent
makes cooperative). All meaning is in `wire`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from typing import Any

from loadtest.outcome import Outcome
from loadtest.target import Target
from loadtest.wire import Exchange, request_bytes

_READ_BYTES = 1 << 16


async def ask(target: Target, path: str, body: dict[str, Any], timeout_s: float, late_s: float = 0.0) -> Outcome:
    """Never raises for what the server or the network does: a failure is an outcome. `timeout_s` bounds all of it."""
    request = request_bytes(target, path, body)
    exchange = Exchange(time.monotonic())
    try:
        async with asyncio.timeout(timeout_s):
            tls = ssl.create_default_context() if target.tls else None
            reader, writer = await asyncio.open_connection(target.host, target.port, ssl=tls)
            with contextlib.closing(writer):
                writer.write(request)
                while not exchange.finished:
                    exchange.feed(await reader.read(_READ_BYTES), time.monotonic())
    except TimeoutError:
        exchange.fail(f"no end within {timeout_s:g} s")
    except OSError as error:
        exchange.fail(str(error))
    return exchange.outcome(late_s)


def ask_blocking(target: Target, path: str, body: dict[str, Any], timeout_s: float) -> Outcome:
    """As `ask`."""
    request = request_bytes(target, path, body)
    began_s = time.monotonic()
    exchange = Exchange(began_s)
    try:
        with _connect(target, timeout_s) as connection:
            connection.sendall(request)
            while not exchange.finished:
                connection.settimeout(max(0.001, began_s + timeout_s - time.monotonic()))
                exchange.feed(connection.recv(_READ_BYTES), time.monotonic())
    except TimeoutError:
        exchange.fail(f"no end within {timeout_s:g} s")
    except OSError as error:
        exchange.fail(str(error))
    return exchange.outcome()


def _connect(target: Target, timeout_s: float) -> socket.socket:
    connection = socket.create_connection((target.host, target.port), timeout_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not target.tls:
        return connection
    return ssl.create_default_context().wrap_socket(connection, server_hostname=target.host)
