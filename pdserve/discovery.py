"""Who is there: records `namespace / component / endpoint-id` under Redis leases, or a fixed list of addresses.

    writer    Lease: SET record EX 10 every 3 s, and the id into the component's member set; deleted at exit
    reader    Discovery.poll(): the endpoints that are listed now, or None when that cannot be known now

Redis is a hint (design invariant I8): it only adds addresses. Whether a worker lives is decided by its own session, so
an expired, emptied, frozen or absent Redis removes nobody. No call raises because of Redis, and each is bounded in
time; a change of its state is logged once. The member set keeps a poll independent of how many other keys Redis holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Awaitable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from kvstore.background import keep_running
from kvstore.records import read_record
from pdserve.errors import ConfigError

if TYPE_CHECKING:
    from redis.asyncio import Redis

T = TypeVar("T")

log = logging.getLogger(__name__)

LEASE_TTL_S = 10
LEASE_RENEW_S = 3.0
# Off the request path, so a late answer costs freshness only.
CALL_TIMEOUT_S = 0.2
CHECK_TIMEOUT_S = 3.0  # of the one look before a start
MAX_ENDPOINTS = 1024
MAX_RECORD_BYTES = 4096

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[\w.-]{1,253}):\d{1,5}")

# Deletes the record only while it is still ours: a successor under the same id may have written its own.
_RELEASE = """
if redis.call('get', KEYS[1]) == ARGV[1] then
  redis.call('del', KEYS[1])
  redis.call('srem', KEYS[2], ARGV[2])
end
return 0
"""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One process that can be dialled. `incarnation` differs between two lives of the same `endpoint_id`."""

    namespace: str
    component: str  # "worker", or a user's own (pdserve.client)
    endpoint_id: str
    address: str  # host:port of its gRPC or HTTP service
    incarnation: int = 0  # 0: not known before the handshake
    role: str = ""
    admin_address: str = ""  # host:port of metrics, ledger and health; a worker's only
    protocol_version: int = 0  # 0: not known before the handshake

    @property
    def record_key(self) -> str:
        return f"{members_key(self.namespace, self.component)}:{self.endpoint_id}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Endpoint:
        """Raises ValueError for anything that is not such a record."""
        value = read_record(text, MAX_RECORD_BYTES, "an endpoint record")
        names = ("namespace", "component", "endpoint_id", "address", "role", "admin_address")
        strings = {name: value.get(name, "") for name in names}
        numbers = {name: value.get(name, 0) for name in ("incarnation", "protocol_version")}
        if not all(isinstance(field, str) for field in strings.values()) or not all(
            isinstance(field, int) for field in numbers.values()
        ):
            raise ValueError("an endpoint record has a field of the wrong type")
        if not strings["endpoint_id"] or not _ADDRESS.fullmatch(strings["address"]):
            raise ValueError("an endpoint record needs an endpoint_id and an address host:port")
        return cls(**strings, **numbers)


def members_key(namespace: str, component: str) -> str:
    return f"pdserve:{namespace}:{component}"


class Discovery(Protocol):
    """Where addresses come from. `poll` returns within about `CALL_TIMEOUT_S` and never raises."""

    async def poll(self) -> Sequence[Endpoint] | None:
        """Endpoints listed now; None when it cannot be known now."""
        ...

    async def close(self) -> None: ...


class StaticDiscovery:
    """A fixed list of `host:port`; needs no Redis."""

    def __init__(self, addresses: Sequence[str], *, namespace: str = "default", component: str = "worker") -> None:
        """Raises ConfigError for what is no address: nobody would ever answer there."""
        for address in addresses:
            if not _ADDRESS.fullmatch(address):
                raise ConfigError(f"'{address[:100]}' is no address of a {component}: write HOST:PORT.")
        self._endpoints = tuple(
            Endpoint(namespace=namespace, component=component, endpoint_id=address, address=address)
            for address in addresses
        )

    async def poll(self) -> Sequence[Endpoint] | None:
        return self._endpoints

    async def close(self) -> None:
        pass


class RedisDiscovery:
    """The records of one component, as Redis lists them now."""

    def __init__(self, url: str, *, namespace: str = "default", component: str = "worker") -> None:
        self._redis = _Calls(url)
        self._members = members_key(namespace, component)

    async def poll(self) -> Sequence[Endpoint] | None:
        try:
            return await self._redis.bounded(self._read())
        except _Down:
            return None

    async def _read(self) -> list[Endpoint]:
        client = self._redis.client
        ids = cast("list[bytes]", await _awaited(client.srandmember(self._members, MAX_ENDPOINTS)) or [])
        if not ids:
            return []
        records = await _awaited(client.mget([f"{self._members}:{name.decode(errors='replace')}" for name in ids]))
        expired = [name for name, record in zip(ids, records, strict=True) if record is None]
        if expired:
            # A live lease puts its id back with the next renewal.
            await _awaited(client.srem(self._members, *expired))
        return [endpoint for record in records if record is not None and (endpoint := _parsed(record)) is not None]

    async def close(self) -> None:
        await self._redis.close()


class Lease:
    """Keeps one endpoint listed while it is entered; a flushed or restarted Redis has it back within one renewal."""

    def __init__(
        self, url: str, endpoint: Endpoint, *, ttl_s: int = LEASE_TTL_S, renew_s: float = LEASE_RENEW_S
    ) -> None:
        self._redis = _Calls(url)
        self._endpoint = endpoint
        self._ttl_s = ttl_s
        self._renew_s = renew_s
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def update(self, *, role: str) -> None:
        """The record says so from now on; it is written at once."""
        self._endpoint = replace(self._endpoint, role=role)
        self._news.set()

    async def __aenter__(self) -> Lease:
        self._task = keep_running(self._renew_forever, f"lease {self._endpoint.endpoint_id}")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(_Down):
            await self._redis.bounded(self._release())
        await self._redis.close()

    async def _renew_forever(self) -> None:
        while True:
            try:
                await self._redis.bounded(self._renew())
                pause_s = self._renew_s
            except _Down:
                pause_s = min(1.0, self._renew_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._news.wait()
            self._news.clear()

    async def _renew(self) -> None:
        endpoint = self._endpoint
        async with self._redis.client.pipeline(transaction=True) as pipe:
            pipe.set(endpoint.record_key, endpoint.to_json(), ex=self._ttl_s)
            pipe.sadd(members_key(endpoint.namespace, endpoint.component), endpoint.endpoint_id)
            await pipe.execute()

    async def _release(self) -> None:
        endpoint = self._endpoint
        keys = (endpoint.record_key, members_key(endpoint.namespace, endpoint.component))
        await _awaited(self._redis.client.eval(_RELEASE, 2, *keys, endpoint.to_json(), endpoint.endpoint_id))


async def ping_redis(url: str) -> None:
    """For who cannot go on without it. Raises ConfigError, which says why no Redis answers there, within seconds."""
    calls = _Calls(url)
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            await _awaited(calls.client.ping())
    except calls.errors as error:
        reason = str(error).rstrip(".") or f"nothing within {CHECK_TIMEOUT_S:g} s"
        where = url.rpartition("@")[2]  # what stands before it may be a password
        raise ConfigError(
            f"No Redis answers at {where} ({reason}): start one there, correct --redis, or leave it out."
        ) from error
    finally:
        await calls.close()


class _Down(Exception):
    """Redis gave no answer in time, or a wrong one."""


class _Calls:
    """A Redis client whose calls are bounded in time, with one log line per change between up and down."""

    def __init__(self, url: str) -> None:
        try:
            from redis.asyncio import Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import RedisError
        except ImportError as error:
            raise ConfigError("--redis needs the package `redis`: pip install 'redis[hiredis]'") from error
        try:
            self.client: Redis = Redis.from_url(url, retry=Retry(NoBackoff(), 0))
        except ValueError as error:
            raise ConfigError(f"not a Redis URL: {error}") from error
        self.errors = (RedisError, OSError, TimeoutError, ValueError)
        self._up: bool | None = None

    async def bounded(self, call: Awaitable[T]) -> T:
        """Raises `_Down`."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                result = await call
        except self.errors as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else f"no answer within {CALL_TIMEOUT_S:g} s"
            self._note(False, reason)
            raise _Down from error
        self._note(True, "")
        return result

    def _note(self, up: bool, reason: str) -> None:
        if not up and self._up is not False:
            log.warning("redis is down: %s", reason)
        elif up and self._up is False:
            log.info("redis is back")
        self._up = up

    async def close(self) -> None:
        with contextlib.suppress(*self.errors):
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await self.client.aclose()


def _parsed(record: bytes) -> Endpoint | None:
    try:
        return Endpoint.from_json(record)
    except ValueError as error:
        log.warning("ignored an endpoint record: %s", error)
        return None


async def _awaited(result: Any) -> Any:
    """redis-py types each command as maybe awaitable; under `redis.asyncio` it always is."""
    return await result
