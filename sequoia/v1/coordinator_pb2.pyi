from sequoia.v1 import sampling_pb2 as _sampling_pb2
from sequoia.v1 import tree_pb2 as _tree_pb2
from sequoia.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ToolCallForm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TOOL_CALL_FORM_UNSPECIFIED: _ClassVar[ToolCallForm]
    TOOL_CALL_FORM_HERMES: _ClassVar[ToolCallForm]

class SpeculationMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SPECULATION_MODE_UNSPECIFIED: _ClassVar[SpeculationMode]
    SPECULATION_MODE_AUTO: _ClassVar[SpeculationMode]
    SPECULATION_MODE_OFF: _ClassVar[SpeculationMode]
    SPECULATION_MODE_TREE: _ClassVar[SpeculationMode]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]

class SpeculationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SPECULATION_STATE_UNSPECIFIED: _ClassVar[SpeculationState]
    SPECULATION_STATE_ON: _ClassVar[SpeculationState]
    SPECULATION_STATE_REDUCED: _ClassVar[SpeculationState]
    SPECULATION_STATE_OFF: _ClassVar[SpeculationState]
TOOL_CALL_FORM_UNSPECIFIED: ToolCallForm
TOOL_CALL_FORM_HERMES: ToolCallForm
SPECULATION_MODE_UNSPECIFIED: SpeculationMode
SPECULATION_MODE_AUTO: SpeculationMode
SPECULATION_MODE_OFF: SpeculationMode
SPECULATION_MODE_TREE: SpeculationMode
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
SPECULATION_STATE_UNSPECIFIED: SpeculationState
SPECULATION_STATE_ON: SpeculationState
SPECULATION_STATE_REDUCED: SpeculationState
SPECULATION_STATE_OFF: SpeculationState

class GenerateRequest(_message.Message):
    __slots__ = ("text", "chat", "token_ids", "sampling", "max_tokens", "stop", "speculation", "generated_token_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    chat: Chat
    token_ids: TokenIds
    sampling: _sampling_pb2.Sampling
    max_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[bytes]
    speculation: Speculation
    generated_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, text: _Optional[str] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[_sampling_pb2.Sampling, _Mapping]] = ..., max_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[bytes]] = ..., speculation: _Optional[_Union[Speculation, _Mapping]] = ..., generated_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages", "tools_json", "tool_call_form")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOOLS_JSON_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALL_FORM_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    tools_json: str
    tool_call_form: ToolCallForm
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., tools_json: _Optional[str] = ..., tool_call_form: _Optional[_Union[ToolCallForm, str]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content", "tool_calls_json", "tool_call_id", "name")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALLS_JSON_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALL_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    tool_calls_json: str
    tool_call_id: str
    name: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ..., tool_calls_json: _Optional[str] = ..., tool_call_id: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Speculation(_message.Message):
    __slots__ = ("mode", "topology", "dynamic", "rule")
    MODE_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    DYNAMIC_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    mode: SpeculationMode
    topology: _tree_pb2.Topology
    dynamic: _tree_pb2.DynamicShape
    rule: _sampling_pb2.Rule
    def __init__(self, mode: _Optional[_Union[SpeculationMode, str]] = ..., topology: _Optional[_Union[_tree_pb2.Topology, _Mapping]] = ..., dynamic: _Optional[_Union[_tree_pb2.DynamicShape, _Mapping]] = ..., rule: _Optional[_Union[_sampling_pb2.Rule, str]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "num_prompt_tokens", "text", "token_ids", "finish", "logprobs", "rule", "seed", "num_tokens_before")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    num_prompt_tokens: int
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish: Finish
    logprobs: _containers.RepeatedCompositeFieldContainer[_sampling_pb2.TokenLogprobs]
    rule: _sampling_pb2.Rule
    seed: int
    num_tokens_before: int
    def __init__(self, request_id: _Optional[str] = ..., num_prompt_tokens: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[_sampling_pb2.TokenLogprobs, _Mapping]]] = ..., rule: _Optional[_Union[_sampling_pb2.Rule, str]] = ..., seed: _Optional[int] = ..., num_tokens_before: _Optional[int] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("reason", "num_completion_tokens", "speculation", "time_to_first_token_seconds", "total_seconds", "num_cached_prompt_tokens")
    REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    reason: FinishReason
    num_completion_tokens: int
    speculation: SpeculationReport
    time_to_first_token_seconds: float
    total_seconds: float
    num_cached_prompt_tokens: int
    def __init__(self, reason: _Optional[_Union[FinishReason, str]] = ..., num_completion_tokens: _Optional[int] = ..., speculation: _Optional[_Union[SpeculationReport, _Mapping]] = ..., time_to_first_token_seconds: _Optional[float] = ..., total_seconds: _Optional[float] = ..., num_cached_prompt_tokens: _Optional[int] = ...) -> None: ...

class SpeculationReport(_message.Message):
    __slots__ = ("num_steps", "num_drafted_steps", "num_drafted_tokens", "num_accepted_tokens", "stages", "num_fallback_steps", "fallback_reason", "counts_by_depth", "num_draft_bytes", "num_verify_bytes", "state", "state_reason", "trees", "num_ngram_tokens", "num_accepted_ngram_tokens")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTED_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_FALLBACK_STEPS_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_REASON_FIELD_NUMBER: _ClassVar[int]
    COUNTS_BY_DEPTH_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_VERIFY_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STATE_REASON_FIELD_NUMBER: _ClassVar[int]
    TREES_FIELD_NUMBER: _ClassVar[int]
    NUM_NGRAM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_NGRAM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    num_drafted_steps: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    stages: StageSeconds
    num_fallback_steps: int
    fallback_reason: str
    counts_by_depth: _containers.RepeatedCompositeFieldContainer[RankCounts]
    num_draft_bytes: int
    num_verify_bytes: int
    state: SpeculationState
    state_reason: str
    trees: _containers.RepeatedCompositeFieldContainer[TreeUsage]
    num_ngram_tokens: int
    num_accepted_ngram_tokens: int
    def __init__(self, num_steps: _Optional[int] = ..., num_drafted_steps: _Optional[int] = ..., num_drafted_tokens: _Optional[int] = ..., num_accepted_tokens: _Optional[int] = ..., stages: _Optional[_Union[StageSeconds, _Mapping]] = ..., num_fallback_steps: _Optional[int] = ..., fallback_reason: _Optional[str] = ..., counts_by_depth: _Optional[_Iterable[_Union[RankCounts, _Mapping]]] = ..., num_draft_bytes: _Optional[int] = ..., num_verify_bytes: _Optional[int] = ..., state: _Optional[_Union[SpeculationState, str]] = ..., state_reason: _Optional[str] = ..., trees: _Optional[_Iterable[_Union[TreeUsage, _Mapping]]] = ..., num_ngram_tokens: _Optional[int] = ..., num_accepted_ngram_tokens: _Optional[int] = ...) -> None: ...

class TreeUsage(_message.Message):
    __slots__ = ("topology", "dynamic", "num_steps", "num_tokens", "stages", "num_ahead_hits", "num_ahead_misses", "hit_draft_seconds", "num_nodes", "num_levels")
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    DYNAMIC_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_AHEAD_HITS_FIELD_NUMBER: _ClassVar[int]
    NUM_AHEAD_MISSES_FIELD_NUMBER: _ClassVar[int]
    HIT_DRAFT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_NODES_FIELD_NUMBER: _ClassVar[int]
    NUM_LEVELS_FIELD_NUMBER: _ClassVar[int]
    topology: _tree_pb2.Topology
    dynamic: _tree_pb2.DynamicShape
    num_steps: int
    num_tokens: int
    stages: StageSeconds
    num_ahead_hits: int
    num_ahead_misses: int
    hit_draft_seconds: float
    num_nodes: int
    num_levels: int
    def __init__(self, topology: _Optional[_Union[_tree_pb2.Topology, _Mapping]] = ..., dynamic: _Optional[_Union[_tree_pb2.DynamicShape, _Mapping]] = ..., num_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ..., stages: _Optional[_Union[StageSeconds, _Mapping]] = ..., num_ahead_hits: _Optional[int] = ..., num_ahead_misses: _Optional[int] = ..., hit_draft_seconds: _Optional[float] = ..., num_nodes: _Optional[int] = ..., num_levels: _Optional[int] = ...) -> None: ...

class RankCounts(_message.Message):
    __slots__ = ("num_offered", "num_accepted")
    NUM_OFFERED_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    num_offered: _containers.RepeatedScalarFieldContainer[int]
    num_accepted: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, num_offered: _Optional[_Iterable[int]] = ..., num_accepted: _Optional[_Iterable[int]] = ...) -> None: ...

class StageSeconds(_message.Message):
    __slots__ = ("draft", "verify", "network", "host", "prefill", "forwards", "work", "draft_forwards", "draft_work")
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FORWARDS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_WORK_FIELD_NUMBER: _ClassVar[int]
    draft: float
    verify: float
    network: float
    host: float
    prefill: float
    forwards: float
    work: float
    draft_forwards: float
    draft_work: float
    def __init__(self, draft: _Optional[float] = ..., verify: _Optional[float] = ..., network: _Optional[float] = ..., host: _Optional[float] = ..., prefill: _Optional[float] = ..., forwards: _Optional[float] = ..., work: _Optional[float] = ..., draft_forwards: _Optional[float] = ..., draft_work: _Optional[float] = ...) -> None: ...

class DescribePairRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribePairResponse(_message.Message):
    __slots__ = ("verify", "draft", "verify_rtt_seconds", "draft_rtt_seconds", "plans_json", "default_rule", "has_chat_template")
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    VERIFY_RTT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_RTT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PLANS_JSON_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_RULE_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    verify: _worker_pb2.WorkerDescription
    draft: _worker_pb2.WorkerDescription
    verify_rtt_seconds: float
    draft_rtt_seconds: float
    plans_json: _containers.RepeatedScalarFieldContainer[str]
    default_rule: _sampling_pb2.Rule
    has_chat_template: bool
    def __init__(self, verify: _Optional[_Union[_worker_pb2.WorkerDescription, _Mapping]] = ..., draft: _Optional[_Union[_worker_pb2.WorkerDescription, _Mapping]] = ..., verify_rtt_seconds: _Optional[float] = ..., draft_rtt_seconds: _Optional[float] = ..., plans_json: _Optional[_Iterable[str]] = ..., default_rule: _Optional[_Union[_sampling_pb2.Rule, str]] = ..., has_chat_template: bool = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("temperature", "rule", "num_sessions", "num_context_tokens")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    rule: _sampling_pb2.Rule
    num_sessions: int
    num_context_tokens: int
    def __init__(self, temperature: _Optional[float] = ..., rule: _Optional[_Union[_sampling_pb2.Rule, str]] = ..., num_sessions: _Optional[int] = ..., num_context_tokens: _Optional[int] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("plan_json", "situation", "planned_situation", "state", "state_reason", "realised", "num_ahead_hits", "num_ahead_misses")
    PLAN_JSON_FIELD_NUMBER: _ClassVar[int]
    SITUATION_FIELD_NUMBER: _ClassVar[int]
    PLANNED_SITUATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STATE_REASON_FIELD_NUMBER: _ClassVar[int]
    REALISED_FIELD_NUMBER: _ClassVar[int]
    NUM_AHEAD_HITS_FIELD_NUMBER: _ClassVar[int]
    NUM_AHEAD_MISSES_FIELD_NUMBER: _ClassVar[int]
    plan_json: str
    situation: str
    planned_situation: str
    state: SpeculationState
    state_reason: str
    realised: _containers.RepeatedCompositeFieldContainer[RealisedPace]
    num_ahead_hits: int
    num_ahead_misses: int
    def __init__(self, plan_json: _Optional[str] = ..., situation: _Optional[str] = ..., planned_situation: _Optional[str] = ..., state: _Optional[_Union[SpeculationState, str]] = ..., state_reason: _Optional[str] = ..., realised: _Optional[_Iterable[_Union[RealisedPace, _Mapping]]] = ..., num_ahead_hits: _Optional[int] = ..., num_ahead_misses: _Optional[int] = ...) -> None: ...

class RealisedPace(_message.Message):
    __slots__ = ("topology", "dynamic", "num_steps", "num_tokens", "seconds")
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    DYNAMIC_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    topology: _tree_pb2.Topology
    dynamic: _tree_pb2.DynamicShape
    num_steps: float
    num_tokens: float
    seconds: float
    def __init__(self, topology: _Optional[_Union[_tree_pb2.Topology, _Mapping]] = ..., dynamic: _Optional[_Union[_tree_pb2.DynamicShape, _Mapping]] = ..., num_steps: _Optional[float] = ..., num_tokens: _Optional[float] = ..., seconds: _Optional[float] = ...) -> None: ...
