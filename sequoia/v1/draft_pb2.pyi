from sequoia.v1 import sampling_pb2 as _sampling_pb2
from sequoia.v1 import tree_pb2 as _tree_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DraftAhead(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRAFT_AHEAD_UNSPECIFIED: _ClassVar[DraftAhead]
    DRAFT_AHEAD_NOT_ATTEMPTED: _ClassVar[DraftAhead]
    DRAFT_AHEAD_HIT: _ClassVar[DraftAhead]
    DRAFT_AHEAD_MISS: _ClassVar[DraftAhead]
DRAFT_AHEAD_UNSPECIFIED: DraftAhead
DRAFT_AHEAD_NOT_ATTEMPTED: DraftAhead
DRAFT_AHEAD_HIT: DraftAhead
DRAFT_AHEAD_MISS: DraftAhead

class DraftRequest(_message.Message):
    __slots__ = ("open", "step")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    open: DraftOpen
    step: DraftStep
    def __init__(self, open: _Optional[_Union[DraftOpen, _Mapping]] = ..., step: _Optional[_Union[DraftStep, _Mapping]] = ...) -> None: ...

class DraftOpen(_message.Message):
    __slots__ = ("token_ids", "num_prompt_tokens", "sampling", "rule", "has_own_device", "max_num_tokens")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    HAS_OWN_DEVICE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    sampling: _sampling_pb2.Sampling
    rule: _sampling_pb2.Rule
    has_own_device: bool
    max_num_tokens: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_sampling_pb2.Sampling, _Mapping]] = ..., rule: _Optional[_Union[_sampling_pb2.Rule, str]] = ..., has_own_device: bool = ..., max_num_tokens: _Optional[int] = ...) -> None: ...

class DraftStep(_message.Message):
    __slots__ = ("step", "base_len", "token_ids", "topology", "dynamic")
    STEP_FIELD_NUMBER: _ClassVar[int]
    BASE_LEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    DYNAMIC_FIELD_NUMBER: _ClassVar[int]
    step: int
    base_len: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    topology: _tree_pb2.Topology
    dynamic: _tree_pb2.DynamicShape
    def __init__(self, step: _Optional[int] = ..., base_len: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., topology: _Optional[_Union[_tree_pb2.Topology, _Mapping]] = ..., dynamic: _Optional[_Union[_tree_pb2.DynamicShape, _Mapping]] = ...) -> None: ...

class DraftResponse(_message.Message):
    __slots__ = ("step", "num_committed", "tree", "worker_seconds", "ahead", "times", "ngram_nodes")
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    TREE_FIELD_NUMBER: _ClassVar[int]
    WORKER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    NGRAM_NODES_FIELD_NUMBER: _ClassVar[int]
    step: int
    num_committed: int
    tree: _tree_pb2.TokenTree
    worker_seconds: float
    ahead: DraftAhead
    times: _tree_pb2.WorkerTimes
    ngram_nodes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., num_committed: _Optional[int] = ..., tree: _Optional[_Union[_tree_pb2.TokenTree, _Mapping]] = ..., worker_seconds: _Optional[float] = ..., ahead: _Optional[_Union[DraftAhead, str]] = ..., times: _Optional[_Union[_tree_pb2.WorkerTimes, _Mapping]] = ..., ngram_nodes: _Optional[_Iterable[int]] = ...) -> None: ...
