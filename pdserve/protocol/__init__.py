"""The control plane's wire format: `worker.proto`, the code generated from it (`make proto`), and the codec.

`component.proto` is what components of users speak (`pdserve.client`), with a version of its own.
"""

PROTOCOL_VERSION = 3
COMPONENT_PROTOCOL_VERSION = 1
