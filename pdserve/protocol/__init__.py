"""The control plane's wire format: `worker.proto`, the code generated from it (`make proto`), and the codec."""

PROTOCOL_VERSION = 3
