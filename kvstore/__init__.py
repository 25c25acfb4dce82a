"""The leaf: block keys and layout, the block pool, and the transfer plane. Imports nothing of `pdserve` or `router`."""
