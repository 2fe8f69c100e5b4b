"""What goes into a request: the client's options, and their wire form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict

from google.protobuf.message import Message as ProtoMessage

from sequoia.errors import InvalidArgument
from sequoia.rules import RULES
from sequoia.topology import DynamicShape, Topology, TreeShape
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import sampling_pb2
from sequoia.wire import rule_to_wire, shape_to_wire


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; `role` is "system", "user", "assistant" or "tool".

    The calls that an assistant made are OpenAI's objects, {"id", "type": "function", "function": {"name",
    "arguments"}}, with arguments as an object or as its JSON text; only beside them `content` may be None. A result has
    the call's id and the tool's name, as far as the model's chat template tells them.
    """

    role: str
    content: str | None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    tool_call_id: str = ""
    name: str = ""


Prompt: TypeAlias = str | Sequence[Message] | Sequence[int]
Speculation: TypeAlias = Literal["auto", "off", "tree"] | TreeShape
Stop: TypeAlias = Sequence[str | bytes]


class RequestOptions(TypedDict, total=False):
    """What a request may say beside its prompt. What is left out, or None, takes the server's default.

    The parameters act on p as sequoia.sampling.Sampling tells; each is honoured exactly or refused by name.
    """

    max_tokens: int | None  # most tokens to generate
    temperature: float | None  # 0 is greedy
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float]  # token id -> what is added to its logit
    seed: int | None  # the same text for the same seed, whatever the draft and the tree
    stop: Stop  # strings that end the answer
    stop_token_ids: Sequence[int]  # tokens that end the answer, besides the model's own
    ignore_eos: bool | None  # go on at the model's own end-of-sequence tokens
    min_tokens: int | None  # nothing ends the answer before it has so many
    logprobs: int | None  # logarithms of probabilities, with so many likeliest tokens beside each
    json_schema: str | Mapping[str, Any] | None  # what the answer is held to: as JSON, or what makes that
    tools: str | Sequence[Mapping[str, Any]] | None  # that a conversation's model is told of, OpenAI's objects
    tool_call_form: str | None  # "hermes": refuse a model whose chat template does not teach it
    speculation: Speculation
    rule: str | None  # a name of sequoia.rules.RULES


_WHOLE = "a whole number from 0 to 2**32 - 1"
# Options that are fields of the wire's Sampling, by the names they have there.
_SCALARS = {
    "temperature": ("temperature", "a number"),
    "top_p": ("top_p", "a number"),
    "top_k": ("top_k", _WHOLE),
    "min_p": ("min_p", "a number"),
    "repetition_penalty": ("repetition_penalty", "a number"),
    "presence_penalty": ("presence_penalty", "a number"),
    "frequency_penalty": ("frequency_penalty", "a number"),
    "seed": ("seed", "a whole number from 0 to 2**64 - 1"),
    "ignore_eos": ("ignore_eos", "true or false"),
    "min_tokens": ("min_tokens", _WHOLE),
    "logprobs": ("num_logprobs", _WHOLE),
}


def build_request(prompt: Prompt, options: RequestOptions) -> pb.GenerateRequest:
    """The wire form of a request; what is None is left out. Raises InvalidArgument naming the argument."""
    if unknown := sorted(options.keys() - RequestOptions.__annotations__.keys()):
        raise InvalidArgument(f"is no option; known are {', '.join(RequestOptions.__annotations__)}", unknown[0])
    request = pb.GenerateRequest()
    _set_prompt(request, prompt)
    _set(request, "max_tokens", options.get("max_tokens"), "max_tokens", "a whole number from 1 to 2**32 - 1")
    for name, (field_name, expected) in _SCALARS.items():
        _set(request.sampling, field_name, options.get(name), name, expected)
    _set_tokens(request.sampling, options)
    _set(request.sampling, "json_schema", _json(options, "json_schema"), "json_schema", "a JSON schema")
    _set_tools(request, options)
    _set_stop(request, options.get("stop", ()))
    request.speculation.CopyFrom(_speculation(options.get("speculation", "auto"), options.get("rule")))
    return request


def build_explain(temperature: float, rule: str | None) -> pb.ExplainRequest:
    """The wire form of a question about requests of that kind. Raises InvalidArgument naming the argument."""
    request = pb.ExplainRequest(rule=_rule_number(rule))
    _set(request, "temperature", temperature, "temperature", "a number")
    return request


def _set(message: ProtoMessage, field_name: str, value: object, name: str, expected: str) -> None:
    if value is None:
        return
    try:
        setattr(message, field_name, value)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{value!r} is not {expected}", name) from error


def _json(values: Mapping[str, Any], name: str) -> object:
    value = values.get(name)
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"JSON cannot write it: {error}", name) from error


def _set_tools(request: pb.GenerateRequest, options: RequestOptions) -> None:
    tools, form = _json(options, "tools"), options.get("tool_call_form")
    if form is not None and form not in _FORMS:
        raise InvalidArgument(f"{form!r} is none of {', '.join(_FORMS)}", "tool_call_form")
    for name, value in (("tools", tools), ("tool_call_form", form)):
        if value is not None and not request.HasField("chat"):
            raise InvalidArgument("goes with a conversation: only chat templates tell of tools", name)
    if tools is not None:
        _set(request.chat, "tools_json", tools, "tools", "a list of tools")
    if form is not None:
        request.chat.tool_call_form = _FORMS[form]


def _set_tokens(sampling: sampling_pb2.Sampling, options: RequestOptions) -> None:
    biases, stops = options.get("logit_bias") or {}, options.get("stop_token_ids") or ()
    try:
        sampling.logit_bias.update(biases)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidArgument(f"{biases!r} does not map token ids to numbers: {error}", "logit_bias") from error
    try:
        sampling.stop_token_ids.extend(stops)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{stops!r} is not a list of token ids: {error}", "stop_token_ids") from error


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    try:
        if isinstance(prompt, str):
            request.text = prompt
            return
        messages = [each for each in prompt if isinstance(each, Message)]
        token_ids = [each for each in prompt if not isinstance(each, Message)]
        if isinstance(prompt, bytes) or bool(messages) == bool(token_ids):
            raise InvalidArgument(
                "give text, a list of Message or a list of token ids, not empty and not mixed", "prompt"
            )
        if messages:
            request.chat.messages.extend(map(_message, messages))
        else:
            request.token_ids.ids.extend(token_ids)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"neither text nor a list of Message or token ids: {error}", "prompt") from error


def _message(message: Message) -> pb.ChatMessage:
    if message.content is None and not message.tool_calls:
        raise InvalidArgument("a message without tool_calls needs a text", "prompt")
    told = pb.ChatMessage(role=message.role, tool_call_id=message.tool_call_id, name=message.name)
    if message.content is not None:
        told.content = message.content
    if message.tool_calls:
        told.tool_calls_json = json.dumps(list(message.tool_calls), ensure_ascii=False)
    return told


def _set_stop(request: pb.GenerateRequest, stop: Stop) -> None:
    if isinstance(stop, str | bytes):
        raise InvalidArgument("give a list of strings, not one string", "stop")
    try:
        request.stop.extend(each.encode() if isinstance(each, str) else each for each in stop)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{stop!r} is not a list of strings in UTF-8: {error}", "stop") from error


_FORMS = {"hermes": pb.TOOL_CALL_FORM_HERMES}
_MODES = {"auto": pb.SPECULATION_MODE_AUTO, "off": pb.SPECULATION_MODE_OFF, "tree": pb.SPECULATION_MODE_TREE}


def _rule_number(rule: str | None) -> sampling_pb2.Rule:
    if rule is not None and rule not in RULES:
        raise InvalidArgument(f"{rule!r} is none of {', '.join(RULES)}", "rule")
    return rule_to_wire(RULES[rule]) if rule else sampling_pb2.RULE_UNSPECIFIED


def _speculation(speculation: Speculation, rule: str | None) -> pb.Speculation:
    number = _rule_number(rule)
    if isinstance(speculation, Topology | DynamicShape):
        return pb.Speculation(mode=pb.SPECULATION_MODE_TREE, rule=number, **shape_to_wire(speculation))
    if not isinstance(speculation, str) or speculation not in _MODES:
        raise InvalidArgument(
            f"{speculation!r} is none of 'auto', 'off', 'tree', a Topology or a DynamicShape", "speculation"
        )
    return pb.Speculation(mode=_MODES[speculation], rule=number)
