"""The index: which node has a block, as Redis remembers it. A hint that is never waited for long and never believed.

    pdserve:<namespace>:kv:<16 raw bytes of the key>   ->  incarnation u64 | tier u8          expires, is renewed
    pdserve:<namespace>:store:<incarnation>            ->  JSON: node_id, address, host_id    expires in seconds

A location names a life of a node: once that life's own record is gone, or the address is another life's, the location
is a miss. Writes are batches of a pipeline from a bounded queue; what does not fit is not announced. Every call is
bounded in time behind a breaker (design invariant I8).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from kvstore.errors import Unavailable
from kvstore.keys import BlockKey
from kvstore.records import read_record
from kvstore.store.breaker import Breaker, BreakerState
from kvstore.store.tier import Tier

T = TypeVar("T")

log = logging.getLogger(__name__)

MAX_LOCATED = 1024  # keys of one call
_MAX_PENDING = 1 << 18  # announcements that wait
_BATCH = 1024
_FLUSH_S = 0.05
_NODE_TTL_S, _NODE_RENEW_S = 10, 3.0
_NODE_CACHE_S = 2.0
_WRITE_TIMEOUT_S = 1.0  # nobody waits for these
_MAX_RECORD_BYTES = 1024
_LOCATION = struct.Struct("<QB")
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[\w.-]{1,253}):\d{1,5}")


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """One life of a store node."""

    incarnation: int
    node_id: str
    address: str  # host:port of its gRPC service for other nodes
    host_id: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: bytes, incarnation: int) -> NodeRecord:
        """Raises ValueError for anything that is not the record of that life."""
        value = read_record(text, _MAX_RECORD_BYTES, "a node record")
        if value.get("incarnation") != incarnation:
            raise ValueError("a node record is of another life")
        node_id, address, host_id = (value.get(name) for name in ("node_id", "address", "host_id"))
        if not (isinstance(node_id, str) and isinstance(address, str) and isinstance(host_id, str)):
            raise ValueError("a node record needs node_id, address and host_id")
        if not _ADDRESS.fullmatch(address):
            raise ValueError("a node record needs an address host:port")
        return cls(incarnation, node_id, address, host_id)


class _Down(Exception):
    """Redis gave no answer in time, or is being left alone."""


class Locations:
    """Use on one loop; `run` in a task of its own."""

    def __init__(self, url: str, namespace: str, me: NodeRecord, *, ttl_s: int = 600, timeout_s: float = 0.05) -> None:
        """Raises Unavailable: no such URL, or the package is missing."""
        self._client, self._is_cluster, self._errors = connect(url)
        self._prefix = f"pdserve:{namespace}:kv:".encode()
        self._node_prefix = f"pdserve:{namespace}:store:"
        self._me = me
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._breaker = Breaker(3, 0.5, 10.0)
        self._pending: dict[BlockKey, Tier] = {}
        self._nodes: dict[int, tuple[float, NodeRecord | None]] = {}
        self.dropped = 0  # announcements that found no room

    @property
    def breaker(self) -> BreakerState:
        return self._breaker.state

    # --- asking ------------------------------------------------------------------------------------------------------

    async def locate(self, keys: Sequence[BlockKey]) -> list[NodeRecord]:
        """Who has the leading keys, one node a key; other lives than ours. Empty while Redis does not answer."""
        if not keys:
            return []
        asked = [self._prefix + key for key in keys[:MAX_LOCATED]]
        try:
            values = await self._bounded(self._mget(asked), self._timeout_s)
            incarnations: list[int] = []
            for value in values:
                if not isinstance(value, bytes) or len(value) != _LOCATION.size:
                    break
                incarnation, _ = _LOCATION.unpack(value)
                if incarnation == self._me.incarnation:
                    break
                incarnations.append(incarnation)
            nodes = await self._resolve(set(incarnations))
        except _Down:
            return []
        found: list[NodeRecord] = []
        for incarnation in incarnations:
            node = nodes.get(incarnation)
            if node is None:
                break
            found.append(node)
        return found

    async def _resolve(self, incarnations: set[int]) -> dict[int, NodeRecord | None]:
        """Raises _Down."""
        now_s = time.monotonic()
        known = {one: node for one in incarnations for at_s, node in [self._nodes.get(one, (-1e9, None))]
                 if now_s - at_s < _NODE_CACHE_S}  # fmt: skip
        unknown = sorted(incarnations - known.keys())
        if unknown:
            records = await self._bounded(
                self._mget([f"{self._node_prefix}{one:x}".encode() for one in unknown]), self._timeout_s
            )
            if len(self._nodes) > _BATCH:
                self._nodes.clear()
            for incarnation, record in zip(unknown, records, strict=True):
                node = None
                with contextlib.suppress(ValueError):
                    node = None if record is None else NodeRecord.from_json(record, incarnation)
                self._nodes[incarnation] = (now_s, node)
                known[incarnation] = node
        return known

    async def _mget(self, keys: list[bytes]) -> Sequence[bytes | None]:
        call = self._client.mget_nonatomic if self._is_cluster else self._client.mget
        values: Sequence[bytes | None] = await call(keys)
        return values

    # --- telling -----------------------------------------------------------------------------------------------------

    def announce(self, tier: Tier, keys: Sequence[BlockKey]) -> None:
        """We have these; told soon, or never."""
        for key in keys:
            if key not in self._pending and len(self._pending) >= _MAX_PENDING:
                self.dropped += 1
                continue
            self._pending[key] = tier

    async def run(self, held: Callable[[], dict[Tier, Sequence[BlockKey]]]) -> None:
        """Until cancelled: renew our record, tell what is announced, and all that is `held` before it expires."""
        renew_s = told_s = 0.0
        while True:
            now_s = time.monotonic()
            if now_s >= renew_s:
                renew_s = now_s + (_NODE_RENEW_S if await self.renew() else _FLUSH_S)
            if now_s - told_s >= self._ttl_s / 2:
                told_s = now_s
                for tier, keys in sorted(held().items(), reverse=True):  # the cheapest tier last: it stays
                    self.announce(tier, keys)
            await self.flush()
            await asyncio.sleep(_FLUSH_S)

    async def renew(self) -> bool:
        """Have our own record live on; whether that worked."""
        key = f"{self._node_prefix}{self._me.incarnation:x}"
        try:
            await self._bounded(self._client.set(key, self._me.to_json(), ex=_NODE_TTL_S), self._timeout_s)
        except _Down:
            return False
        return True

    async def flush(self) -> None:
        """Tell what has been announced; what cannot be told now stays."""
        while self._pending:
            batch = [(key, self._pending[key]) for key, _ in zip(tuple(self._pending), range(_BATCH), strict=False)]
            try:
                await self._bounded(self._write(batch), _WRITE_TIMEOUT_S)
            except _Down:
                return  # they stay; the queue is bounded
            for key, tier in batch:
                if self._pending.get(key) is tier:
                    del self._pending[key]

    async def _write(self, batch: Sequence[tuple[BlockKey, Tier]]) -> None:
        pipe = self._client.pipeline() if self._is_cluster else self._client.pipeline(transaction=False)
        for key, tier in batch:
            pipe.set(self._prefix + key, _LOCATION.pack(self._me.incarnation, tier), ex=self._ttl_s)
        await pipe.execute()

    async def close(self) -> None:
        """Take our record back; what points to it is then nothing to anybody."""
        with contextlib.suppress(_Down):
            await self._bounded(self._client.delete(f"{self._node_prefix}{self._me.incarnation:x}"), self._timeout_s)
        with contextlib.suppress(*self._errors):
            async with asyncio.timeout(self._timeout_s):
                await self._client.aclose()

    async def _bounded(self, call: Awaitable[T], timeout_s: float) -> T:
        """Raises _Down."""
        if not self._breaker.allows(time.monotonic()):
            if asyncio.iscoroutine(call):
                call.close()
            raise _Down
        try:
            async with asyncio.timeout(timeout_s):
                result = await call
        except self._errors as error:
            if self._breaker.state is BreakerState.CLOSED:
                log.warning("the index does not answer: %s", str(error) or f"nothing within {timeout_s:g} s")
            self._breaker.failed(time.monotonic())
            raise _Down from error
        if self._breaker.state is not BreakerState.CLOSED:
            log.info("the index is back")
        self._breaker.succeeded()
        return result


def connect(url: str) -> tuple[Any, bool, tuple[type[Exception], ...]]:
    """The client, whether it is a cluster's, and what its calls may raise. Raises Unavailable.

    Besides what the package takes (`redis://`, `rediss://`, `unix://`, with user and password):
    `redis+cluster://HOST:PORT` and `redis+sentinel://HOST:PORT[,HOST:PORT]/SERVICE`, or `rediss+...` for TLS.
    """
    try:
        from redis.asyncio import Redis, RedisCluster, Sentinel
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError
    except ImportError as error:
        raise Unavailable("--redis needs the package `redis`: pip install 'redis[hiredis]'") from error
    errors = (RedisError, OSError, TimeoutError, ValueError)
    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    retry = Retry(NoBackoff(), 0)
    try:
        if kind == "cluster":
            plain = urlunsplit(parts._replace(scheme=scheme))
            return RedisCluster.from_url(plain, cluster_error_retry_attempts=0, retry=retry), True, errors
        if kind == "sentinel":
            user, _, hosts = parts.netloc.rpartition("@")
            name, _, password = user.partition(":")
            pairs = [(host.rpartition(":")[0], int(host.rpartition(":")[2])) for host in hosts.split(",")]
            # The package's own types say nothing useful here.
            options: dict[str, Any] = {"ssl": scheme == "rediss", "retry": retry}
            sentinel: Any = Sentinel(pairs, **options)  # type: ignore[no-untyped-call]
            service = parts.path.strip("/") or "mymaster"
            return (
                sentinel.master_for(service, username=name or None, password=password or None, **options),
                False,
                errors,
            )
        return Redis.from_url(url, retry=retry), False, errors
    except (RedisError, ValueError, TypeError) as error:
        raise Unavailable(f"not a Redis URL: {error}") from error
