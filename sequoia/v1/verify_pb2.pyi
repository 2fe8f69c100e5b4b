from sequoia.v1 import sampling_pb2 as _sampling_pb2
from sequoia.v1 import tree_pb2 as _tree_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class VerifyRequest(_message.Message):
    __slots__ = ("open", "step")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    open: VerifyOpen
    step: VerifyStep
    def __init__(self, open: _Optional[_Union[VerifyOpen, _Mapping]] = ..., step: _Optional[_Union[VerifyStep, _Mapping]] = ...) -> None: ...

class VerifyOpen(_message.Message):
    __slots__ = ("token_ids", "num_prompt_tokens", "sampling", "rule", "max_num_tokens")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    sampling: _sampling_pb2.Sampling
    rule: _sampling_pb2.Rule
    max_num_tokens: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_sampling_pb2.Sampling, _Mapping]] = ..., rule: _Optional[_Union[_sampling_pb2.Rule, str]] = ..., max_num_tokens: _Optional[int] = ...) -> None: ...

class VerifyStep(_message.Message):
    __slots__ = ("step", "prefix_len", "tree", "num_plain_steps")
    STEP_FIELD_NUMBER: _ClassVar[int]
    PREFIX_LEN_FIELD_NUMBER: _ClassVar[int]
    TREE_FIELD_NUMBER: _ClassVar[int]
    NUM_PLAIN_STEPS_FIELD_NUMBER: _ClassVar[int]
    step: int
    prefix_len: int
    tree: _tree_pb2.TokenTree
    num_plain_steps: int
    def __init__(self, step: _Optional[int] = ..., prefix_len: _Optional[int] = ..., tree: _Optional[_Union[_tree_pb2.TokenTree, _Mapping]] = ..., num_plain_steps: _Optional[int] = ...) -> None: ...

class VerifyResponse(_message.Message):
    __slots__ = ("step", "prefix_len", "verdict", "worker_seconds", "num_plain_steps_left", "times", "num_reused_tokens")
    STEP_FIELD_NUMBER: _ClassVar[int]
    PREFIX_LEN_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    WORKER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PLAIN_STEPS_LEFT_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    NUM_REUSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    step: int
    prefix_len: int
    verdict: Verdict
    worker_seconds: float
    num_plain_steps_left: int
    times: _tree_pb2.WorkerTimes
    num_reused_tokens: int
    def __init__(self, step: _Optional[int] = ..., prefix_len: _Optional[int] = ..., verdict: _Optional[_Union[Verdict, _Mapping]] = ..., worker_seconds: _Optional[float] = ..., num_plain_steps_left: _Optional[int] = ..., times: _Optional[_Union[_tree_pb2.WorkerTimes, _Mapping]] = ..., num_reused_tokens: _Optional[int] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("accepted_nodes", "bonus_token_id", "logprobs")
    ACCEPTED_NODES_FIELD_NUMBER: _ClassVar[int]
    BONUS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    accepted_nodes: _containers.RepeatedScalarFieldContainer[int]
    bonus_token_id: int
    logprobs: _containers.RepeatedCompositeFieldContainer[_sampling_pb2.TokenLogprobs]
    def __init__(self, accepted_nodes: _Optional[_Iterable[int]] = ..., bonus_token_id: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[_sampling_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...
