"""The router's HTTP port as the command line sees it: is it free, does it answer, what does it serve."""

from __future__ import annotations

import errno
import http.client
import json
import os
import shlex
import socket
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from pdserve.errors import ConfigError

_CALL_TIMEOUT_S = 2.0
_DEFAULT_URL = "http://127.0.0.1:8000"
_URL_VARIABLE = "PDSERVE_URL"
# What commands say of their `--url`.
URL_HELP = f"The router; default: ${_URL_VARIABLE}, else {_DEFAULT_URL}."
MAX_ANSWER_BYTES = 16 << 20


def router_url(given: str | None) -> str:
    """The router that a command means."""
    return given or os.environ.get(_URL_VARIABLE) or _DEFAULT_URL


def check_port_free(host: str, port: int) -> None:
    """
    Raises:
        ConfigError: the port is taken or may not be used; names it and says what to do.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, OverflowError) as error:
        raise ConfigError(f"{host}:{port} is no address to listen on: {error}.") from error
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free for a server
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                advice = "is in use: end the program that has it, or choose another one with --port"
            elif error.errno == errno.EACCES:
                advice = "is for the system only: choose one above 1023 with --port"
            else:
                advice = f"cannot be listened on ({error.strerror}): choose another --host or --port"
            raise ConfigError(f"Port {port} on {host} {advice}.") from error


def local_url(host: str, port: int) -> str:
    """Where a client on this machine reaches a server that listens on `host`."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def connect(url: str, timeout_s: float) -> http.client.HTTPConnection:
    """A connection to the server of an http or https URL, not dialled yet. Raises ConfigError for another URL."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{url} is no URL: {error}.") from error
    kinds: dict[str, type[http.client.HTTPConnection]]
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if parts.scheme not in kinds or not host:
        raise ConfigError(f"{url} is no http or https URL.")
    return kinds[parts.scheme](host, port, timeout=timeout_s)


def credentials() -> dict[str, str]:
    """The header with the API key that the environment names; nothing where it names none."""
    key = os.environ.get("PDSERVE_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def get_json(
    url: str, path: str, timeout_s: float = _CALL_TIMEOUT_S, headers: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """The JSON that `GET path` answers with 200.

    Raises:
        OSError: nothing answers, or not in time (http.client.HTTPException, a broken answer, is turned into one).
        ValueError: it answers with another status, whose message this is, or something other than JSON.
    """
    status, body = _exchange(url, "GET", path, None, headers, timeout_s)
    if status in (401, 403):
        raise ValueError(f"it wants another key in PDSERVE_API_KEY (status {status})")
    if status != 200:
        raise ValueError(_said(status, body))
    return json.loads(body)


def post_json(url: str, path: str, body: Any, headers: Mapping[str, str], timeout_s: float) -> Any:
    """The JSON that `POST path` answers with 200.

    Raises:
        OSError: nothing answers, or not in time.
        ValueError: it answers with another status, whose message this is, or something other than JSON.
    """
    headers = {"content-type": "application/json", **headers}
    status, answer = _exchange(url, "POST", path, json.dumps(body).encode(), headers, timeout_s)
    if status != 200:
        raise ValueError(_said(status, answer))
    return json.loads(answer)


def _said(status: int, answer: bytes) -> str:
    """What an answer that is not 200 says of itself."""
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"it answered with status {status}"


def _exchange(
    url: str, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
) -> tuple[int, bytes]:
    """Status and body."""
    connection = connect(url, timeout_s)
    try:
        connection.request(method, path, body, {**credentials(), **headers})
        response = connection.getresponse()
        answer = response.read(MAX_ANSWER_BYTES + 1)
    except http.client.HTTPException as error:
        raise OSError(f"no valid HTTP answer: {type(error).__name__}") from error
    finally:
        connection.close()
    if len(answer) > MAX_ANSWER_BYTES:
        raise ValueError(f"its answer is longer than {MAX_ANSWER_BYTES >> 20} MiB")
    return response.status, answer


def first_model(url: str) -> str:
    """The name of the first model served. Raises OSError or ValueError as `get_json` does."""
    try:
        return str(get_json(url, "/v1/models")["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("its list of models is empty or malformed") from error


def example_command(url: str, model: str) -> str:
    """A shell command that streams a chat completion."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is gravity?"}],
        "temperature": 0,  # a small model rambles at the API's default of 1
        "stream": True,
    }
    return f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
