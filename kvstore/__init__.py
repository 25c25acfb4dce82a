"""The leaf: block keys and layout, the block pool, and the transfer plane. Imports nothing of `pdserve` or `router`."""

import os

__version__ = "0.1.0"  # of all three packages

# grpc reads both when it is imported, and every process comes by here before that.
# What forks here starts another program at once, and needs no gRPC between: one was seen that did not live until then.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Its event engine hands each message that a client receives from thread to thread: 5.4 context switches and 80 us of
# CPU in place of 2 and 48.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client")
