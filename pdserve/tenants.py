"""Tenants and their API keys, as a TOML file that operators keep and routers read (`--tenants-file`).

    cache_secret = "64 hex digits"       # block keys of one deployment cannot be derived in another

    [tenants.acme]
    slo = "interactive"                  # what x-pdserve-slo could say; else standard
    requests_per_minute = 600            # limits are optional
    tokens_per_minute = 200_000          # prompt and output together
    concurrent_requests = 32
    cache_group = "research"             # tenants of one group share cached blocks; else each has its own

    [[tenants.acme.keys]]
    id = "1f0c9a2e"
    sha256 = "64 hex digits"             # of the secret; the key itself, pds_ID_SECRET, is in no file
    expires = 2027-01-01T00:00:00Z       # optional

Several keys of one tenant may be valid at once, which is how one is replaced by another.
"""

from __future__ import annotations

import hmac
import math
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from pdserve.errors import ConfigError

MAX_NAME_BYTES = 64  # the store keeps a tenant's name with each block
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"pds_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NO_DIGEST = bytes(32)  # what the secret of an unknown key is compared with


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """None is no limit. Each router counts for itself."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """
    Attributes:
        name: "" is nobody in particular, in a deployment without tenants.
        slo: class of requests that name none, as the header x-pdserve-slo has it; "" is the default.
        cache_group: whose cached blocks its requests may use.
    """

    name: str = ""
    slo: str = ""
    cache_group: str = ""
    limits: TenantLimits = TenantLimits()


NOBODY = Tenant()


@dataclass(frozen=True, slots=True)
class _ApiKey:
    tenant: Tenant
    digest: bytes
    expires_s: float  # Unix time


class Tenants:
    """What one file says. Immutable."""

    def __init__(self, keys: Mapping[str, _ApiKey], cache_secret: bytes) -> None:
        self._keys = keys
        self._cache_secret = cache_secret

    @classmethod
    def parse(cls, text: str, check_slo: Callable[[str], None] = lambda slo: None) -> Tenants:
        """`check_slo` raises ConfigError for a class that does not exist, as this does for all that is wrong."""
        try:
            given = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"it is not TOML ({error})") from error
        _only(given, {"cache_secret", "tenants"}, "the file")
        secret = given.get("cache_secret")
        if not (isinstance(secret, str) and _DIGEST.fullmatch(secret)):
            raise ConfigError("cache_secret must be 64 hex digits")
        keys: dict[str, _ApiKey] = {}
        for name, table in _table(given.get("tenants", {}), "tenants").items():
            tenant = _tenant(name, _table(table, f"tenants.{name}"))
            check_slo(tenant.slo)
            for entry in table.get("keys", []):
                key_id, key = _api_key(tenant, _table(entry, f"a key of tenant {name}"))
                if key_id in keys:
                    raise ConfigError(f"the key id {key_id} stands twice")
                keys[key_id] = key
        return cls(keys, bytes.fromhex(secret))

    def find(self, key: str, now_s: float) -> Tenant | None:
        """Whose API key this is; None for one that is unknown, wrong or, at Unix time `now_s`, expired."""
        match = _KEY.fullmatch(key)
        if match is None:
            return None
        key_id, secret = match.groups()
        known = self._keys.get(key_id)
        # An unknown id takes as long as a wrong secret.
        right = hmac.compare_digest(sha256(secret.encode()).digest(), known.digest if known else _NO_DIGEST)
        return known.tenant if known is not None and right and now_s < known.expires_s else None

    def cache_salt(self, tenant: Tenant, narrowed: str = "") -> bytes:
        """32 bytes for the root of a tenant's block keys; `narrowed` by the client's own salt."""
        return cache_salt(self._cache_secret, tenant.cache_group, narrowed)


def cache_salt(secret: bytes, group: str, narrowed: str) -> bytes:
    """HMAC-SHA256 over length-prefixed fields: no two pairs of group and salt give the same."""
    fields = [text.encode() for text in (group, narrowed)]
    return hmac.digest(secret, b"".join(len(field).to_bytes(4, "big") + field for field in fields), "sha256")


class TenantsFile:
    """A file of tenants that is read again when it has changed: an added key works, a removed one ends, at once.

    A change that cannot be used leaves in force what was read before.
    """

    def __init__(self, path: Path, check_slo: Callable[[str], None] = lambda slo: None) -> None:
        """Raises ConfigError if it cannot be used."""
        self._check_slo = check_slo
        self._path = path
        self._seen = self._stamp()
        self.tenants = self._read()

    def refresh(self) -> bool:
        """Read it again if it has changed; True if that gave other tenants. Raises ConfigError, once for a change."""
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        self._seen = stamp
        self.tenants = self._read()
        return True

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size

    def _read(self) -> Tenants:
        try:
            with self._path.open(encoding="utf-8") as file:
                if os.fstat(file.fileno()).st_mode & stat.S_IRWXO:
                    raise ConfigError(f"{self._path} can be read by everybody: chmod 600 {self._path}")
                return Tenants.parse(file.read(), self._check_slo)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(f"The tenants cannot be read from {self._path} ({reason}).") from error
        except ConfigError as error:
            raise ConfigError(f"{self._path}: {error}") from error


def add_key(path: Path, name: str, *, expires_s: float | None = None) -> str:
    """A new API key of tenant `name`, added to the file, which is made if need be. Returns the key: it is kept nowhere.

    Raises:
        ConfigError: the name or the file cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "A tenant's name has 1 to 64 letters, digits, '.', '_' or '-', and begins with one of the first two."
        )
    if path.exists():
        TenantsFile(path)
        text = path.read_text(encoding="utf-8")
    else:
        text = f'cache_secret = "{secrets.token_hex(32)}"\n'
    key_id, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    lines = [f'[[tenants."{name}".keys]]', f'id = "{key_id}"', f'sha256 = "{sha256(secret.encode()).hexdigest()}"']
    if expires_s is not None:
        lines.append(f"expires = {datetime.fromtimestamp(expires_s, UTC):%Y-%m-%dT%H:%M:%SZ}")
    text = text.rstrip("\n") + "\n\n" + "\n".join(lines) + "\n"
    Tenants.parse(text)
    beside = path.with_name(path.name + ".new")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        beside.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}).") from error
    return f"pds_{key_id}_{secret}"


def _tenant(name: str, table: Mapping[str, Any]) -> Tenant:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"'{name[:64]}' is no name of a tenant: letters, digits, '.', '_', '-'")
    limits = ("requests_per_minute", "tokens_per_minute", "concurrent_requests")
    _only(table, {"keys", "slo", "cache_group", *limits}, f"tenant {name}")
    for limit in limits:
        value = table.get(limit)
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{limit} of tenant {name} must be a whole number above 0")
    for text in ("slo", "cache_group"):
        if not isinstance(table.get(text, ""), str):
            raise ConfigError(f"{text} of tenant {name} must be a string")
    if not isinstance(table.get("keys", []), list):
        raise ConfigError(f"keys of tenant {name} are written [[tenants.{name}.keys]]")
    # A group cannot be named so that it meets a tenant without one.
    group = f"group {table['cache_group']}" if table.get("cache_group") else f"tenant {name}"
    return Tenant(name, table.get("slo", ""), group, TenantLimits(*(table.get(limit) for limit in limits)))


def _api_key(tenant: Tenant, entry: Mapping[str, Any]) -> tuple[str, _ApiKey]:
    where = f"a key of tenant {tenant.name}"
    _only(entry, {"id", "sha256", "expires"}, where)
    key_id, digest, expires = entry.get("id"), entry.get("sha256"), entry.get("expires")
    if not (isinstance(key_id, str) and re.fullmatch(r"[0-9a-f]{8}", key_id)):
        raise ConfigError(f"the id of {where} must be 8 hex digits")
    if not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
        raise ConfigError(f"sha256 of {where} must be 64 hex digits")
    if expires is None:
        return key_id, _ApiKey(tenant, bytes.fromhex(digest), math.inf)
    if not (isinstance(expires, datetime) and expires.tzinfo is not None):
        raise ConfigError(f"expires of {where} must be a time with its zone, as 2027-01-01T00:00:00Z")
    return key_id, _ApiKey(tenant, bytes.fromhex(digest), expires.timestamp())


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a table")
    return value


def _only(table: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(table) - known):
        raise ConfigError(f"{where} has an unknown setting '{unknown[0][:64]}'; there are {', '.join(sorted(known))}")
