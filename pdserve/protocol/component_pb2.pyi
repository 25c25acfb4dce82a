from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ComponentCall(_message.Message):
    __slots__ = ("protocol_version", "endpoint", "payload")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    endpoint: str
    payload: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., endpoint: _Optional[str] = ..., payload: _Optional[bytes] = ...) -> None: ...

class ComponentReply(_message.Message):
    __slots__ = ("payload", "failure")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    failure: ComponentFailure
    def __init__(self, payload: _Optional[bytes] = ..., failure: _Optional[_Union[ComponentFailure, _Mapping]] = ...) -> None: ...

class ComponentFailure(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
