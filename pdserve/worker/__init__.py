"""A worker process: one engine, one role. Joins the engine (pdserve.engine) with the transfer plane (kvstore.transfer).

Three threads: asyncio (gRPC, admin HTTP, all decisions about hand-overs), the engine's (pool, scheduler, model), and
the transport's (progress of transfers). The engine thread never waits for a peer; asyncio never computes.
"""
