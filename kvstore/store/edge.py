"""What the gRPC services of a node share: the checks of what a caller sent."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from kvstore.keys import BlockKey
from kvstore.store.opened import NodeState, OpenStore
from kvstore.store.wire import split_keys

Context = grpc.aio.ServicerContext[Any, Any]


async def keys_of(data: bytes, context: Context) -> list[BlockKey]:
    try:
        return split_keys(data)
    except ValueError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        raise


async def opened_store(state: NodeState, context: Context) -> OpenStore:
    """Ends the call if no worker has attached yet."""
    if state.opened is None:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no worker has attached yet")
    assert state.opened is not None
    return state.opened
