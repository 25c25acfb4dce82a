"""The other process of test_process_death.py: `peer_process.py send|receive`, one JSON line in, events out.

It swaps addresses, then starts `count` sends or receives of `size` bytes filled with 0xAB, and prints `started` and,
when all have ended, how many by outcome. It ends when its standard input does.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter

import numpy as np

from kvstore.transfer.transport import Completion
from tests.support.transports import make_transport, same_host


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


def main() -> None:
    outcomes: Counter[str] = Counter()
    done = threading.Event()

    def handler(completion: Completion) -> None:
        outcomes[completion.outcome.value] += 1
        if outcomes.total() == count:
            done.set()

    role = sys.argv[1]
    order = json.loads(sys.stdin.readline())
    count, size = order["count"], order["size"]
    data = np.full((count, size), 0xAB if role == "send" else 0, np.uint8)
    transport = make_transport(order["kind"], data.reshape(-1))
    link = transport.open(handler, same_host=same_host(order["kind"]))
    say(address=link.address.hex())
    link.connect(bytes.fromhex(order["address"]))
    for n in range(count):
        if role == "send":
            link.send(n, data[n])
        else:
            link.receive(n, data[n])
    say(started=count)
    if done.wait(60):
        say(**outcomes)
    sys.stdin.read()
    transport.close()


main()
