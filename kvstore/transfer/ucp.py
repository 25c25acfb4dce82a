"""Calls of UCX that its Python bindings lack: cancel, name the transports of an endpoint, and end a worker for certain.

They take the addresses that the bindings hand out (`ucxx_ptr`, `handle`) and know nothing else of them. The
shared libraries must already be loaded; `kvstore.transfer.ucx` sees to that.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

_FIELD_TRANSPORTS = 1 << 3  # UCP_EP_ATTR_FIELD_TRANSPORTS
_MAX_TRANSPORTS = 16
# C++ names of ucxx 0.52, as UCXRequest has no cancel and UCXEndpoint no count of its own.
_CANCEL = "_ZN4ucxx10RequestTag6cancelEv"  # RequestTag::cancel()
_COUNT_ENDING = "_ZNK4ucxx8Endpoint16getCancelingSizeEv"  # Endpoint::getCancelingSize() const


class _TransportEntry(ctypes.Structure):  # ucp_transport_entry_t
    _fields_ = (("transport", ctypes.c_char_p), ("device", ctypes.c_char_p))


class _Transports(ctypes.Structure):  # ucp_transports_t
    _fields_ = (
        ("entries", ctypes.POINTER(_TransportEntry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
    )


class _EndpointAttributes(ctypes.Structure):  # ucp_ep_attr_t of UCX 1.12 and later
    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_sockaddr", ctypes.c_uint64 * 16),
        ("remote_sockaddr", ctypes.c_uint64 * 16),
        ("transports", _Transports),
        ("user_data", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class UcpCalls:
    """The entry points, bound."""

    _cancel: Any
    _count_ending: Any
    _query: Any
    _destroy: Any

    @classmethod
    def load(cls) -> UcpCalls:
        """Raises OSError or AttributeError where the loaded UCX is not one that we know."""
        ucxx = ctypes.CDLL("libucxx.so")
        cancel, count_ending = getattr(ucxx, _CANCEL), getattr(ucxx, _COUNT_ENDING)
        cancel.argtypes, cancel.restype = (ctypes.c_void_p,), None
        count_ending.argtypes, count_ending.restype = (ctypes.c_void_p,), ctypes.c_size_t
        ucp = ctypes.CDLL("libucp.so.0")
        query, destroy = ucp.ucp_ep_query, ucp.ucp_worker_destroy
        destroy.argtypes, destroy.restype = (ctypes.c_void_p,), None
        query.argtypes, query.restype = (ctypes.c_void_p, ctypes.POINTER(_EndpointAttributes)), ctypes.c_int
        return cls(cancel, count_ending, query, destroy)

    def cancel(self, request_ptr: int) -> None:
        """Ask a tagged send or receive to end; one that has matched already ends as it would have."""
        self._cancel(request_ptr)

    def count_ending(self, endpoint_ptr: int) -> int:
        """Sends of a closed endpoint that UCX has not ended yet.

        The call also makes ucxx forget those that have ended; without it they keep the UCX worker alive for ever.
        """
        return int(self._count_ending(endpoint_ptr))

    def destroy(self, worker: Any) -> None:
        """Destroy the UCX worker under its Python object, whose own destructor must then never run: it is leaked."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(worker))
        self._destroy(worker.handle)

    def transports(self, endpoint_handle: int) -> list[str]:
        """`transport/device` of each lane of the endpoint, say `posix/memory`; empty if UCX does not tell."""
        entries = (_TransportEntry * _MAX_TRANSPORTS)()
        attributes = _EndpointAttributes(field_mask=_FIELD_TRANSPORTS)
        attributes.transports = _Transports(entries, _MAX_TRANSPORTS, ctypes.sizeof(_TransportEntry))
        if self._query(endpoint_handle, ctypes.byref(attributes)) != 0:
            return []
        lanes = entries[: attributes.transports.num_entries]
        return [f"{(lane.transport or b'?').decode()}/{(lane.device or b'?').decode()}" for lane in lanes]
