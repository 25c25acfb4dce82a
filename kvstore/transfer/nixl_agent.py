"""The calls of NIXL that we make, through its bindings: an agent with its memory, reads of a peer's, notifications.

The bindings themselves, not NIXL's Python API: that passes descriptors as pickles, which may do anything when loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore.errors import TransferError, Unavailable
from kvstore.transfer.transport import DeviceBuffer, Memory

_PACKAGES = ("nixl_cu13", "nixl_cu12")
# NIXL has no other way to be told. Reads over cuda_ipc are off by default where UCX sees no NVLink, as in many virtual
# machines.
_ENVIRONMENT = {
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
}
# No TCP, and no handling of errors by UCX: NIXL 1.5.1 goes on with endpoints that UCX has freed, and ends the process,
# where the one notices that a peer is gone. Within a machine that is learnt elsewhere.
_WAYS, _DEVICE_WAYS = "sm", "sm,cuda_copy,cuda_ipc"
_BACKEND = {"ucx_error_handling_mode": "none"}


def load() -> Any:
    """NIXL's bindings. Raises Unavailable."""
    for name in _PACKAGES:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(f"{name}._bindings")
    raise Unavailable("NIXL needs the package nixl-cu12 or nixl-cu13, 1.5 (pip install --no-deps)")


@dataclass(frozen=True, slots=True)
class Place:
    """A run of bytes as NIXL knows it."""

    address: int
    size: int
    device: int
    is_device: bool

    @classmethod
    def of(cls, memory: Memory) -> Place:
        if isinstance(memory, DeviceBuffer):
            return cls(memory.pointer, memory.nbytes, memory.device, True)
        return cls(memory.__array_interface__["data"][0], memory.nbytes, 0, False)

    def holds(self, other: Place) -> bool:
        return (
            (self.device, self.is_device) == (other.device, other.is_device)
            and self.address <= other.address
            and other.address + other.size <= self.address + self.size
        )


class NixlAgent:
    """One agent and its UCX worker; of one thread. What NIXL refuses is a TransferError. Unusable after `close`."""

    def __init__(self, library: Any, name: str, places: Sequence[Place]) -> None:
        self._library = library
        self.closed = False
        config = library.nixlAgentConfig()
        config.useProgThread = config.useListenThread = config.captureTelemetry = False
        config.syncMode = library.NIXL_THREAD_SYNC_NONE
        ways = _DEVICE_WAYS if any(place.is_device for place in places) else _WAYS
        with _environment({"UCX_TLS": ways}), self._told("NIXL cannot open a link"):
            self._agent = library.nixlAgent(name, config)
            self._agent.createBackend("UCX", _BACKEND)
        for place in places:
            self.register(place)

    def register(self, place: Place) -> Any:
        """What `deregister` takes."""
        descriptors = self._library.nixlRegDList(self._kind(place.is_device), [(*_triple(place), "")])
        with self._told("memory cannot be registered"):
            self._agent.registerMem(descriptors)
        return descriptors

    def deregister(self, registered: Any) -> None:
        with self._told("memory cannot be given back"):
            self._agent.deregisterMem(registered)

    def metadata(self) -> bytes:
        """How to reach this agent, and what of its memory can be read."""
        with self._told("NIXL has no address"):
            return bytes(self._agent.getLocalMD())

    def connect(self, metadata: bytes) -> str:
        """The peer's name."""
        with self._told("NIXL cannot reach the peer"):
            return str(self._agent.loadRemoteMD(metadata).decode())

    def read(self, peer: str, pairs: Sequence[tuple[Place, Place]]) -> int:
        """Begin to read from the second of each pair, the peer's, into the first, of the same kinds and sizes all."""
        lists = [
            self._library.nixlXferDList(
                self._kind(side[0].is_device), np.array([_triple(place) for place in side], np.uint64)
            )
            for side in zip(*pairs, strict=True)
        ]
        with self._told("a read cannot begin"):
            handle = int(self._agent.createXferReq(self._library.NIXL_READ, *lists, peer))
            try:
                self._agent.postXferReq(handle)
            except Exception:
                self._agent.releaseXferReq(handle)
                raise
            return handle

    def has_read(self, handle: int) -> bool:
        with self._told("a read failed"):
            return bool(self._agent.getXferStatus(handle) == self._library.NIXL_SUCCESS)

    def forget(self, handle: int) -> None:
        """Let go of a read, of which nothing may be under way."""
        with self._told("a read cannot be given back"):
            self._agent.releaseXferReq(handle)

    def notify(self, peer: str, message: bytes) -> None:
        with self._told("the peer cannot be told"):
            self._agent.genNotif(peer, message)

    def notifications(self) -> list[bytes]:
        """What peers told since; all work of NIXL's is done in here, too."""
        with self._told("NIXL failed"):
            return [message for told in self._agent.getNotifs({}).values() for message in told]

    def close(self) -> None:
        """Its UCX worker is destroyed: whatever was being read, nothing of it lands any more."""
        self.closed = True
        del self._agent

    def _kind(self, is_device: bool) -> Any:
        return self._library.VRAM_SEG if is_device else self._library.DRAM_SEG

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # NIXL's have no root of their own
            raise TransferError(f"{what}: {error}") from None


def _triple(place: Place) -> tuple[int, int, int]:
    return place.address, place.size, place.device


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """Ours are for NIXL alone; whoever has set them wins."""
    ours = {name: value for name, value in (_ENVIRONMENT | more).items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
