"""Facts that only an import can tell: `python -m pdserve.launch.probe torch|ucx|kernels`, a process of its own.

A broken library may crash its process; here that costs one line of `pdserve doctor`. Prints one JSON object: `facts` (a
list of short texts) or `problem`.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable

import numpy as np

from kvstore.errors import KvError
from kvstore.transfer.transport import Completion, Outcome, Transport
from pdserve.errors import ConfigError

_MESSAGE_BYTES = 256 * 1024
_TIMEOUT_S = 10.0


def torch_facts() -> list[str]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    features = [
        name
        for name, asked in (("AVX512-BF16", "_is_avx512_bf16_supported"), ("AMX", "_is_amx_tile_supported"))
        if getattr(torch.cpu, asked, bool)()
    ]
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return [
        torch.__version__,
        f"device {device}",
        f"{torch.get_num_threads()} threads by default",
        " ".join((capability, *features)),
    ]


def ucx_facts() -> list[str]:
    """A message really sent to ourselves by each kind of link, and what carried it."""
    from importlib.metadata import version

    from kvstore.transfer.ucx import UcxTransport

    transport = UcxTransport()
    try:
        return [
            f"ucxx {version(_installed('ucxx'))}, libucx {version(_installed('libucx'))}",
            f"within a machine {_carried(transport, same_host=True)}",
            f"between machines {_carried(transport, same_host=False)}",
        ]
    finally:
        transport.close()


def _installed(name: str) -> str:
    """The distribution `name-cu12` or whichever CUDA version is installed."""
    from importlib.metadata import distributions

    found = (str(one.metadata["Name"]) for one in distributions())
    return next((one for one in found if one.rpartition("-cu")[0] == name), f"{name}-cu12")


def _carried(transport: Transport, *, same_host: bool) -> str:
    """Which transports took a message from one link to another. Raises TransferError if it did not arrive."""
    done: dict[int, Completion] = {}
    arrived = threading.Event()
    ends = [transport.open(lambda completion: None, same_host=same_host)]

    def received(completion: Completion) -> None:
        done[0] = completion
        arrived.set()

    ends.append(transport.open(received, same_host=same_host))
    sender, receiver = ends
    try:
        sender.connect(receiver.address)
        receiver.connect(sender.address)
        buffer = np.zeros(_MESSAGE_BYTES, np.uint8)
        receiver.receive(1, buffer)
        sender.send(1, np.ones(_MESSAGE_BYTES, np.uint8))
        if not arrived.wait(_TIMEOUT_S):
            return "nothing: a message did not arrive"
        if done[0].outcome is not Outcome.DONE or not buffer.all():
            return f"nothing: {done[0].error or 'a message was damaged'}"
        return sender.describe() or "an unknown transport"
    finally:
        for end in ends:
            end.close()


def kernel_facts() -> list[str]:
    from pdserve.kernels import choose

    return [choose("auto").name]


PROBES: dict[str, Callable[[], list[str]]] = {"torch": torch_facts, "ucx": ucx_facts, "kernels": kernel_facts}


def main() -> None:
    try:
        result: dict[str, object] = {"facts": PROBES[sys.argv[1]]()}
    except (ImportError, OSError, KvError, ConfigError) as error:
        result = {"problem": str(error).splitlines()[0] if str(error) else type(error).__name__}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
