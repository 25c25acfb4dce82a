"""The leaf: block keys and layout, the block pool, and the transfer plane. Imports nothing of `pdserve` or `router`."""

__version__ = "0.1.0"  # of all three packages
