"""Load tests of any OpenAI-compatible endpoint: workloads, a light client, the sweep for goodput, locust users.

Imports `pdserve` and nothing imports it. One request passes through `workload` (what to ask and when), `client` (bytes
on a socket), `wire` (bytes to events, pure) and `outcome` (what the client saw).
"""
