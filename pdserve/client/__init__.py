"""Components of one's own: a process serves endpoints, others find and call it, without configuration.

    serve(component, {endpoint: handler})     registers a record, answers calls, drains            server.py
    Client(discovery, endpoint)               round_robin, random or direct, streaming            client.py
      Instances                               who is there, from discovery                        instances.py
      Channels                                one connection an address, for as long as used      channels.py
    ComponentError                            what a call can fail with                           errors.py

A request is bytes, an answer a stream of bytes; what they mean is the component's own business. docs/components.md has
an example.
"""

from pdserve.client.client import Client
from pdserve.client.errors import (
    CallLost,
    CallTimeout,
    ComponentError,
    HandlerFailed,
    NoInstances,
    NotStarted,
    UnknownInstance,
)
from pdserve.client.server import Handler, Server, serve

__all__ = [
    "CallLost",
    "CallTimeout",
    "Client",
    "ComponentError",
    "Handler",
    "HandlerFailed",
    "NoInstances",
    "NotStarted",
    "Server",
    "UnknownInstance",
    "serve",
]
