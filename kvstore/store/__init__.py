"""The tiered KV store of one machine: host memory, disk and, found through an index in Redis, other machines."""
