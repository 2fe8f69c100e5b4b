from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Topology(_message.Message):
    __slots__ = ("parents",)
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    parents: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, parents: _Optional[_Iterable[int]] = ...) -> None: ...

class DynamicShape(_message.Message):
    __slots__ = ("size", "levels", "width", "least_chance", "least_gain")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    LEAST_CHANCE_FIELD_NUMBER: _ClassVar[int]
    LEAST_GAIN_FIELD_NUMBER: _ClassVar[int]
    size: int
    levels: int
    width: int
    least_chance: float
    least_gain: float
    def __init__(self, size: _Optional[int] = ..., levels: _Optional[int] = ..., width: _Optional[int] = ..., least_chance: _Optional[float] = ..., least_gain: _Optional[float] = ...) -> None: ...

class TokenTree(_message.Message):
    __slots__ = ("topology", "token_ids", "q")
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    topology: Topology
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    q: DraftDistributions
    def __init__(self, topology: _Optional[_Union[Topology, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., q: _Optional[_Union[DraftDistributions, _Mapping]] = ...) -> None: ...

class DraftDistributions(_message.Message):
    __slots__ = ("width", "token_ids", "weights")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    width: int
    token_ids: bytes
    weights: bytes
    def __init__(self, width: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., weights: _Optional[bytes] = ...) -> None: ...

class WorkerTimes(_message.Message):
    __slots__ = ("forwards", "work")
    FORWARDS_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    forwards: float
    work: float
    def __init__(self, forwards: _Optional[float] = ..., work: _Optional[float] = ...) -> None: ...
