"""Bytes per second from one process's memory to another's, through the transport seam, against memcpy in the same run.

    python -m kvstore.transfer.bench --json FILE

Two real processes: this one receives, a child sends. A round is one ticket: the receives of 256 blocks are posted, the
child is told to start, and the round ends with the last completion here. memcpy is numpy's, of the same batch, measured
before and after each case. The default model's real block is 360 KiB.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from kvstore.errors import TransferError
from kvstore.transfer.tags import MAX_TICKET_ID, message_tag
from kvstore.transfer.transport import Buffer, Completion, Link, Outcome
from kvstore.transfer.ucx import UcxTransport

BLOCK_KIB = (64, 360, 1024)
BATCH_BLOCKS = 256
ROUNDS = 12
WARM_UP_ROUNDS = 3
_ROUND_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Result:
    """Medians over the rounds; a share is of memcpy in the same run."""

    path: str
    transports: str
    block_kib: int
    gb_per_s: float
    memcpy_gb_per_s: float
    share_of_memcpy: float
    receiver_cpu_s_per_gb: float


class Batch:
    """Waits until all operations of a round have ended well."""

    def __init__(self) -> None:
        self._left = 0
        self._failed = ""
        self._done = threading.Event()

    def begin(self) -> None:
        self._left = BATCH_BLOCKS
        self._done.clear()

    def __call__(self, completion: Completion) -> None:
        if completion.outcome is not Outcome.DONE:
            self._failed = completion.error or completion.outcome.value
        self._left -= 1
        if self._left == 0:
            self._done.set()

    def wait(self) -> None:
        if not self._done.wait(_ROUND_DEADLINE_S):
            raise TransferError("a round did not end in time")
        if self._failed:
            raise TransferError(f"a transfer failed: {self._failed}")


def _say(stream: IO[str], message: dict[str, object]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def _blocks(block_kib: int, fill: int) -> Buffer:
    """`[BATCH_BLOCKS, block bytes]`, all pages touched."""
    return np.full((BATCH_BLOCKS, block_kib << 10), fill, np.uint8)


def _memcpy_gb_per_s(source: Buffer, target: Buffer) -> float:
    times_s = []
    for _ in range(5):
        begin_s = time.perf_counter()
        for n in range(BATCH_BLOCKS):
            np.copyto(target[n], source[n])
        times_s.append(time.perf_counter() - begin_s)
    return source.nbytes / statistics.median(times_s) / 1e9


def _receive_rounds(link: Link, batch: Batch, into: Buffer, child: IO[str]) -> tuple[float, float]:
    """Median bytes/s in GB/s, and CPU seconds of this process per GB."""
    times_s, cpu_s = [], []
    for _ in range(WARM_UP_ROUNDS + ROUNDS):
        ticket_id = secrets.randbelow(MAX_TICKET_ID)
        into[:, 0] = 0
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        batch.begin()
        for n in range(BATCH_BLOCKS):
            link.receive(message_tag(ticket_id, n), into[n])
        _say(child, {"ticket_id": ticket_id})
        batch.wait()
        times_s.append(time.perf_counter() - begin_s)
        cpu_s.append(time.process_time() - begin_cpu_s)
        if not (into[:, 0] == 1).all():
            raise TransferError("a block did not arrive")
    gigabytes = into.nbytes / 1e9
    return gigabytes / statistics.median(times_s[WARM_UP_ROUNDS:]), statistics.median(
        cpu_s[WARM_UP_ROUNDS:]
    ) / gigabytes


def measure(block_kib: int, *, same_host: bool) -> Result:
    batch = Batch()
    transport = UcxTransport()
    link = transport.open(batch, same_host=same_host)
    command = [sys.executable, "-m", "kvstore.transfer.bench", "--sender"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        _say(child.stdin, {"address": link.address.hex(), "same_host": same_host, "block_kib": block_kib})
        link.connect(bytes.fromhex(json.loads(child.stdout.readline())["address"]))
        into, source = _blocks(block_kib, 0), _blocks(block_kib, 1)
        before = _memcpy_gb_per_s(source, into)
        speed, cpu = _receive_rounds(link, batch, into, child.stdin)
        memcpy = (before + _memcpy_gb_per_s(source, into)) / 2
        path = "same host" if same_host else "remote, error handling on"
        return Result(path, link.describe(), block_kib, speed, memcpy, speed / memcpy, cpu)
    finally:
        child.stdin.close()
        child.wait(_ROUND_DEADLINE_S)
        transport.close()


def _send_rounds() -> None:
    """The child: one line of parameters in, its address out, then a ticket id a round until the input ends."""
    order = json.loads(sys.stdin.readline())
    batch = Batch()
    transport = UcxTransport()
    link = transport.open(batch, same_host=order["same_host"])
    _say(sys.stdout, {"address": link.address.hex()})
    link.connect(bytes.fromhex(order["address"]))
    data = _blocks(order["block_kib"], 1)
    for line in sys.stdin:
        ticket_id = json.loads(line)["ticket_id"]
        batch.begin()
        for n in range(BATCH_BLOCKS):
            link.send(message_tag(ticket_id, n), data[n])
        batch.wait()
    transport.close()


def _table(results: list[Result]) -> str:
    lines = [f"{'path':<26}{'uses':<16}{'block':>9}{'GB/s':>8}{'memcpy':>8}{'share':>7}{'CPU s/GB':>10}"]
    lines += [
        f"{r.path:<26}{r.transports:<16}{r.block_kib:>5} KiB{r.gb_per_s:>8.2f}{r.memcpy_gb_per_s:>8.2f}"
        f"{r.share_of_memcpy:>7.0%}{r.receiver_cpu_s_per_gb:>10.2f}"
        for r in results
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the transfer plane between two processes of this machine.")
    parser.add_argument("--json", type=Path, help="write the results here instead of to standard output")
    parser.add_argument("--sender", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sender:
        _send_rounds()
        return
    results = [measure(kib, same_host=same_host) for same_host in (True, False) for kib in BLOCK_KIB]
    report = json.dumps([asdict(result) for result in results], indent=1)
    if arguments.json:
        arguments.json.write_text(report + "\n")
    else:
        print(report)
    print(_table(results))


if __name__ == "__main__":
    main()
