from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TierStat(_message.Message):
    __slots__ = ("tier", "blocks", "bytes", "capacity_bytes", "hits", "evictions", "corrupt", "breaker")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FIELD_NUMBER: _ClassVar[int]
    BREAKER_FIELD_NUMBER: _ClassVar[int]
    tier: str
    blocks: int
    bytes: int
    capacity_bytes: int
    hits: int
    evictions: int
    corrupt: int
    breaker: str
    def __init__(self, tier: _Optional[str] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., hits: _Optional[int] = ..., evictions: _Optional[int] = ..., corrupt: _Optional[int] = ..., breaker: _Optional[str] = ...) -> None: ...

class StatReply(_message.Message):
    __slots__ = ("node_id", "incarnation", "address", "fingerprint", "block_bytes", "tiers", "slots", "misses", "write_behind_bytes", "tenant_bytes", "problems")
    class SlotsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class TenantBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    WRITE_BEHIND_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENANT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    incarnation: int
    address: str
    fingerprint: bytes
    block_bytes: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierStat]
    slots: _containers.ScalarMap[str, int]
    misses: int
    write_behind_bytes: int
    tenant_bytes: _containers.ScalarMap[str, int]
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, node_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., block_bytes: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierStat, _Mapping]]] = ..., slots: _Optional[_Mapping[str, int]] = ..., misses: _Optional[int] = ..., write_behind_bytes: _Optional[int] = ..., tenant_bytes: _Optional[_Mapping[str, int]] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class BlockInfo(_message.Message):
    __slots__ = ("key", "parent", "tier", "leases", "tenant", "pin")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    parent: bytes
    tier: int
    leases: int
    tenant: str
    pin: str
    def __init__(self, key: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., tier: _Optional[int] = ..., leases: _Optional[int] = ..., tenant: _Optional[str] = ..., pin: _Optional[str] = ...) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockInfo]
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockInfo, _Mapping]]] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("keys", "all", "tier")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    all: bool
    tier: int
    def __init__(self, keys: _Optional[bytes] = ..., all: _Optional[bool] = ..., tier: _Optional[int] = ...) -> None: ...

class EvictReply(_message.Message):
    __slots__ = ("evicted",)
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    evicted: int
    def __init__(self, evicted: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("keys", "hard", "expires_s")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    HARD_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_S_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    hard: bool
    expires_s: float
    def __init__(self, keys: _Optional[bytes] = ..., hard: _Optional[bool] = ..., expires_s: _Optional[float] = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ("pinned",)
    PINNED_FIELD_NUMBER: _ClassVar[int]
    pinned: int
    def __init__(self, pinned: _Optional[int] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VerifyReply(_message.Message):
    __slots__ = ("verified", "corrupt")
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FIELD_NUMBER: _ClassVar[int]
    verified: int
    corrupt: int
    def __init__(self, verified: _Optional[int] = ..., corrupt: _Optional[int] = ...) -> None: ...

class ConnectRequest(_message.Message):
    __slots__ = ("node_id", "incarnation", "host_id", "transport", "link_address", "fingerprint", "block_bytes", "pid", "address")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    LINK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    incarnation: int
    host_id: str
    transport: str
    link_address: bytes
    fingerprint: bytes
    block_bytes: int
    pid: int
    address: str
    def __init__(self, node_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., host_id: _Optional[str] = ..., transport: _Optional[str] = ..., link_address: _Optional[bytes] = ..., fingerprint: _Optional[bytes] = ..., block_bytes: _Optional[int] = ..., pid: _Optional[int] = ..., address: _Optional[str] = ...) -> None: ...

class ConnectReply(_message.Message):
    __slots__ = ("incarnation", "link_address", "pid")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LINK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    link_address: bytes
    pid: int
    def __init__(self, incarnation: _Optional[int] = ..., link_address: _Optional[bytes] = ..., pid: _Optional[int] = ...) -> None: ...

class OfferRequest(_message.Message):
    __slots__ = ("node_id", "incarnation", "keys", "deadline_s")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    incarnation: int
    keys: bytes
    deadline_s: float
    def __init__(self, node_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., keys: _Optional[bytes] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class OfferReply(_message.Message):
    __slots__ = ("offer_id", "keys", "checksums", "tenant")
    OFFER_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    offer_id: int
    keys: bytes
    checksums: _containers.RepeatedScalarFieldContainer[int]
    tenant: str
    def __init__(self, offer_id: _Optional[int] = ..., keys: _Optional[bytes] = ..., checksums: _Optional[_Iterable[int]] = ..., tenant: _Optional[str] = ...) -> None: ...

class SendRequest(_message.Message):
    __slots__ = ("node_id", "offer_id", "ticket_id", "generations", "deadline_s")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    OFFER_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    offer_id: int
    ticket_id: int
    generations: _containers.RepeatedScalarFieldContainer[int]
    deadline_s: float
    def __init__(self, node_id: _Optional[str] = ..., offer_id: _Optional[int] = ..., ticket_id: _Optional[int] = ..., generations: _Optional[_Iterable[int]] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class SendReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FenceRequest(_message.Message):
    __slots__ = ("node_id", "ticket_id")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    ticket_id: int
    def __init__(self, node_id: _Optional[str] = ..., ticket_id: _Optional[int] = ...) -> None: ...

class FenceReply(_message.Message):
    __slots__ = ("sent_ordinals",)
    SENT_ORDINALS_FIELD_NUMBER: _ClassVar[int]
    sent_ordinals: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sent_ordinals: _Optional[_Iterable[int]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("incarnation",)
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    def __init__(self, incarnation: _Optional[int] = ...) -> None: ...

class KvEvent(_message.Message):
    __slots__ = ("sequence", "kind", "tier", "keys")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STORED: _ClassVar[KvEvent.Kind]
        REMOVED: _ClassVar[KvEvent.Kind]
        CLEARED: _ClassVar[KvEvent.Kind]
        SNAPSHOT_END: _ClassVar[KvEvent.Kind]
    STORED: KvEvent.Kind
    REMOVED: KvEvent.Kind
    CLEARED: KvEvent.Kind
    SNAPSHOT_END: KvEvent.Kind
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    kind: KvEvent.Kind
    tier: int
    keys: bytes
    def __init__(self, sequence: _Optional[int] = ..., kind: _Optional[_Union[KvEvent.Kind, str]] = ..., tier: _Optional[int] = ..., keys: _Optional[bytes] = ...) -> None: ...
