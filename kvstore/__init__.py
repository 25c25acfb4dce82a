"""The leaf: block keys and layout, the block pool, and the transfer plane. Imports nothing of `pdserve` or `router`."""

import os

__version__ = "0.1.0"  # of all three packages

# grpc reads it when it is imported, and every process comes by here before that.
# What forks here starts another program at once, and needs no gRPC between: one was seen that did not live until then.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
