"""What Mooncake's store takes for the same blocks between two processes of this machine: JSON.

Run with the Python of an environment that has `mooncake-transfer-engine-non-cuda` (which needs Debian's libibverbs1),
`python kvstore/store/bench/mooncake_peer.py 64,368,1024`: it imports nothing of pdserve. Its master and a process that
lends the memory are started beside it; this process lends none, so every block crosses to another one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

CALLS, BATCHES, BATCH = 100, 12, 16
_SEGMENT_BYTES = 1 << 30
_BUFFER_BYTES = 256 << 20
_START_S = 30.0


def main() -> None:
    sizes_kib = [int(kib) for kib in sys.argv[1].split(",")]
    with tempfile.TemporaryDirectory() as folder, _master(Path(folder)) as port, _lender(Path(folder), port):
        store = _connect(port, 0)
        found = [measure(store, kib) for kib in sizes_kib]
    print(json.dumps(found), flush=True)
    os._exit(0)  # the library may crash when it is taken down


def measure(store: Any, kib: int) -> dict[str, float]:
    """One call a block, with a copy on either side; and batches into and out of registered memory, without."""
    block_bytes = kib << 10
    data = bytes(range(256)) * (block_bytes // 256)
    memory = mmap.mmap(-1, BATCH * block_bytes)  # whole pages: copies into others are slower
    address = _address(memory)
    addresses, sizes = [address + n * block_bytes for n in range(BATCH)], [block_bytes] * BATCH
    _timed(lambda: store.register_buffer(address, len(memory)) == 0)
    names = [f"{kib}/{n}" for n in range(CALLS)]
    put_s = [_timed(lambda key=key: store.put(key, data) == 0) for key in names]
    get_s = [_timed(lambda key=key: len(store.get(key)) == block_bytes) for key in names]
    batch_put_s, batch_get_s = [], []
    for batch in range(BATCHES):
        keys = [f"{kib}/{batch}/{n}" for n in range(BATCH)]
        batch_put_s.append(_timed(lambda keys=keys: not any(store.batch_put_from(keys, addresses, sizes))))
        batch_get_s.append(_timed(lambda keys=keys: store.batch_get_into(keys, addresses, sizes) == sizes))
    store.unregister_buffer(address)
    store.remove_all()
    put, get, batch_put, batch_get = (statistics.median(one) for one in (put_s, get_s, batch_put_s, batch_get_s))
    return {
        "block_kib": kib,
        "put_gb_per_s": block_bytes / put / 1e9,
        "get_gb_per_s": block_bytes / get / 1e9,
        "put_call_us": 1e6 * put,
        "get_call_us": 1e6 * get,
        "batch_put_gb_per_s": len(memory) / batch_put / 1e9,
        "batch_get_gb_per_s": len(memory) / batch_get / 1e9,
    }


def _timed(call: Callable[..., bool]) -> float:
    began_s = time.perf_counter()
    if not call():
        raise RuntimeError("Mooncake refused a call")
    return time.perf_counter() - began_s


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))


def _connect(port: int, segment_bytes: int) -> Any:
    """A client that lends so many bytes to all."""
    store = import_module("mooncake.store").MooncakeDistributedStore()
    address = f"127.0.0.1:{port}"
    if store.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, _BUFFER_BYTES, "tcp", "", address) != 0:
        raise RuntimeError("Mooncake's store did not start; does `ldconfig -p` list libibverbs.so.1?")
    return store


@contextlib.contextmanager
def _master(folder: Path) -> Iterator[int]:
    port, metrics = _free_port(), _free_port()
    binary = Path(sys.executable).with_name("mooncake_master")
    with (folder / "master.log").open("wb") as log:
        process = subprocess.Popen(
            [str(binary), f"--rpc_port={port}", f"--metrics_port={metrics}"], stdout=log, stderr=log
        )
        try:
            end_s = time.monotonic() + _START_S
            while not _listens(port):
                if time.monotonic() > end_s or process.poll() is not None:
                    raise RuntimeError(f"mooncake_master did not start: {(folder / 'master.log').read_text()[-500:]}")
                time.sleep(0.05)
            yield port
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _lender(folder: Path, port: int) -> Iterator[None]:
    with (folder / "lender.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, "lend", str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
        try:
            assert process.stdout is not None
            if not process.stdout.readline().endswith(b"lending\n"):
                raise RuntimeError(f"no memory was lent: {(folder / 'lender.log').read_text()[-500:]}")
            yield
        finally:
            process.kill()
            process.wait()


def _lend(port: int) -> None:
    store = _connect(port, _SEGMENT_BYTES)
    print("lending", flush=True)
    sys.stdin.read()
    del store


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    if sys.argv[1] == "lend":
        _lend(int(sys.argv[2]))
    else:
        main()
