from sequoia.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_DRAFT: _ClassVar[WorkerRole]
    WORKER_ROLE_VERIFY: _ClassVar[WorkerRole]
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_DRAFT: WorkerRole
WORKER_ROLE_VERIFY: WorkerRole

class DescribeRequest(_message.Message):
    __slots__ = ("include_tokenizer",)
    INCLUDE_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    include_tokenizer: bool
    def __init__(self, include_tokenizer: bool = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("worker", "tokenizer")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerDescription
    tokenizer: TokenizerFiles
    def __init__(self, worker: _Optional[_Union[WorkerDescription, _Mapping]] = ..., tokenizer: _Optional[_Union[TokenizerFiles, _Mapping]] = ...) -> None: ...

class WorkerDescription(_message.Message):
    __slots__ = ("instance_id", "role", "model", "model_revision", "dtype", "quantization", "tokenizer_hash", "vocab_size", "padded_vocab_size", "context_length", "max_tree_size", "rules", "hardware_key", "num_slots", "latencies", "device_id", "kv_tokens")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_HASH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    PADDED_VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_TREE_SIZE_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_KEY_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    LATENCIES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    role: WorkerRole
    model: str
    model_revision: str
    dtype: str
    quantization: str
    tokenizer_hash: str
    vocab_size: int
    padded_vocab_size: int
    context_length: int
    max_tree_size: int
    rules: _containers.RepeatedScalarFieldContainer[_sampling_pb2.Rule]
    hardware_key: str
    num_slots: int
    latencies: _containers.RepeatedCompositeFieldContainer[LatencyCurve]
    device_id: str
    kv_tokens: int
    def __init__(self, instance_id: _Optional[str] = ..., role: _Optional[_Union[WorkerRole, str]] = ..., model: _Optional[str] = ..., model_revision: _Optional[str] = ..., dtype: _Optional[str] = ..., quantization: _Optional[str] = ..., tokenizer_hash: _Optional[str] = ..., vocab_size: _Optional[int] = ..., padded_vocab_size: _Optional[int] = ..., context_length: _Optional[int] = ..., max_tree_size: _Optional[int] = ..., rules: _Optional[_Iterable[_Union[_sampling_pb2.Rule, str]]] = ..., hardware_key: _Optional[str] = ..., num_slots: _Optional[int] = ..., latencies: _Optional[_Iterable[_Union[LatencyCurve, _Mapping]]] = ..., device_id: _Optional[str] = ..., kv_tokens: _Optional[int] = ...) -> None: ...

class LatencyCurve(_message.Message):
    __slots__ = ("num_tokens", "seconds", "num_sessions", "num_context_tokens")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    seconds: _containers.RepeatedScalarFieldContainer[float]
    num_sessions: int
    num_context_tokens: int
    def __init__(self, num_tokens: _Optional[_Iterable[int]] = ..., seconds: _Optional[_Iterable[float]] = ..., num_sessions: _Optional[int] = ..., num_context_tokens: _Optional[int] = ...) -> None: ...

class TokenizerFiles(_message.Message):
    __slots__ = ("tokenizer_json", "chat_template", "eos_token_ids", "special_tokens")
    class SpecialTokensEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TOKENIZER_JSON_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokenizer_json: bytes
    chat_template: str
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    special_tokens: _containers.ScalarMap[str, str]
    def __init__(self, tokenizer_json: _Optional[bytes] = ..., chat_template: _Optional[str] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., special_tokens: _Optional[_Mapping[str, str]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("num_slots", "num_slots_used", "num_forwards", "num_forward_tokens", "offload", "kv_tokens_used", "num_reused_tokens")
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_USED_FIELD_NUMBER: _ClassVar[int]
    NUM_FORWARDS_FIELD_NUMBER: _ClassVar[int]
    NUM_FORWARD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_USED_FIELD_NUMBER: _ClassVar[int]
    NUM_REUSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_slots: int
    num_slots_used: int
    num_forwards: int
    num_forward_tokens: int
    offload: OffloadStatus
    kv_tokens_used: int
    num_reused_tokens: int
    def __init__(self, num_slots: _Optional[int] = ..., num_slots_used: _Optional[int] = ..., num_forwards: _Optional[int] = ..., num_forward_tokens: _Optional[int] = ..., offload: _Optional[_Union[OffloadStatus, _Mapping]] = ..., kv_tokens_used: _Optional[int] = ..., num_reused_tokens: _Optional[int] = ...) -> None: ...

class OffloadStatus(_message.Message):
    __slots__ = ("num_layers", "num_resident_layers", "num_forwards", "num_bytes", "read_seconds", "forward_seconds", "stall_seconds")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_RESIDENT_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_FORWARDS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STALL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_resident_layers: int
    num_forwards: int
    num_bytes: int
    read_seconds: float
    forward_seconds: float
    stall_seconds: float
    def __init__(self, num_layers: _Optional[int] = ..., num_resident_layers: _Optional[int] = ..., num_forwards: _Optional[int] = ..., num_bytes: _Optional[int] = ..., read_seconds: _Optional[float] = ..., forward_seconds: _Optional[float] = ..., stall_seconds: _Optional[float] = ...) -> None: ...
