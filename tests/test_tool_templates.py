"""Tools in the prompt: against transformers' own rendering, and what templates leave out is refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny_models import build_tokenizer
from tool_templates import DEAF, HERMES, NAMED, TOOLS, XML, call
from transformers.utils.chat_template_utils import render_jinja_template

from coordinator.chat_template import ChatTemplate
from coordinator.conversation import Conversation, conversation_from_wire, question
from coordinator.text import TextCodec
from coordinator.tool_support import ToolSupport, probe
from sequoia.errors import InvalidArgument
from sequoia.options import Message, build_request
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import worker_pb2

ARGUMENTS = {"place": 'K"öln', "unit": "C", "n": [1, 2.5, None]}
MESSAGES = [
    Message("system", "Be brief."),
    Message("user", "How is it?"),
    Message("assistant", None, [call("get_weather", json.dumps(ARGUMENTS))]),
    Message("tool", "warm", tool_call_id="abcdef123", name="get_weather"),
    Message("assistant", "", [call("set-clock", {"at": {"hour": 3}})]),
    Message("tool", "set", tool_call_id="abcdef123", name="set-clock"),
]


def as_transformers(arguments: Any, other: Any) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call("get_weather", arguments)]},
        {"role": "tool", "content": "warm", "tool_call_id": "abcdef123", "name": "get_weather"},
        {"role": "assistant", "content": "", "tool_calls": [call("set-clock", other)]},
        {"role": "tool", "content": "set", "tool_call_id": "abcdef123", "name": "set-clock"},
    ]


def support(source: str) -> ToolSupport:
    return probe(ChatTemplate(source, {}))


def told(source: str, conversation: Conversation) -> str:
    template = ChatTemplate(source, {})
    found = probe(template).told(conversation)
    return template.render(found.messages, found.tools)


def over_the_wire(messages: list[Message], **options: Any) -> Conversation:
    sent = build_request(messages, options).SerializeToString()
    return conversation_from_wire(pb.GenerateRequest.FromString(sent).chat)


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (HERMES, as_transformers(ARGUMENTS, {"at": {"hour": 3}})),
        (NAMED, as_transformers(json.dumps(ARGUMENTS, ensure_ascii=False), '{"at": {"hour": 3}}')),
        (XML, as_transformers(ARGUMENTS, {"at": {"hour": 3}})),
    ],
    ids=["hermes", "named", "xml"],
)
def test_tools_calls_and_results_are_told_as_transformers_tells_them(source: str, expected: Any, tools: Any) -> None:
    (rendered,), _ = render_jinja_template(
        conversations=[expected], tools=tools, chat_template=source, add_generation_prompt=True
    )
    assert told(source, over_the_wire(MESSAGES, tools=tools)) == rendered


def test_what_a_template_tells_is_found_out() -> None:
    assert support(HERMES) == ToolSupport(True, True, True, True, wants_text=False)
    assert support(NAMED) == ToolSupport(True, False, True, True, wants_text=True)
    assert support(XML) == ToolSupport(True, False, True, True, wants_text=False)
    deaf = support(DEAF)
    assert (deaf.tells_tools, deaf.teaches_hermes_calls, deaf.tells_calls, deaf.tells_results) == (False,) * 4


@pytest.mark.parametrize(
    ("source", "reads"),
    [
        ("{% if tools is defined and tools %}x{% endif %}", True),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}", True),
        ("{% if custom is defined %}{% set tools = custom %}{% endif %}{% if tools %}x{% endif %}", True),
        ("{% macro f() %}{{ tools | length }}{% endmacro %}{{ f() }}", True),
        ("tools {{ 'tools' }} {{ messages[0].tools }} {# tools #}", False),
        ("{% for tools in messages %}{{ tools }}{% endfor %}", False),
        ("{% set tools = 1 %}{{ tools }}", False),
    ],
)
def test_whether_a_template_reads_tools_is_asked_of_its_syntax(source: str, reads: bool) -> None:
    assert ChatTemplate(source, {}).reads_tools is reads


def codec(source: str, *special: str) -> TextCodec:
    tokenizer = build_tokenizer(400)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    backend = tokenizer.backend_tokenizer.to_str().encode()
    return TextCodec.from_files(worker_pb2.TokenizerFiles(tokenizer_json=backend, chat_template=source))


@pytest.mark.parametrize(
    ("source", "conversation", "field"),
    [
        (DEAF, Conversation(question("hi").messages, TOOLS), "chat.tools"),
        (DEAF, over_the_wire(MESSAGES[1:4]), "chat.messages[1].tool_calls"),
        (DEAF, Conversation([{"role": "tool", "content": "5"}]), "chat.messages[0].role"),
        (XML, Conversation(question("hi").messages, TOOLS, True), "chat.tool_call_form"),
    ],
)
def test_what_a_template_would_leave_out_is_refused_by_its_name(
    source: str, conversation: Conversation, field: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        codec(source).encode_chat(conversation)
    assert refused.value.field == field


def test_calls_between_special_tokens_would_be_seen_by_nobody() -> None:
    conversation = Conversation(question("hi").messages, TOOLS, True)
    assert codec(HERMES).encode_chat(conversation)
    with pytest.raises(InvalidArgument, match="does not teach"):
        codec(HERMES, "<tool_call>").encode_chat(conversation)


def deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


NAME_OF_TOOL = "chat.tools[0].function.name"
CALLS = "chat.messages[0].tool_calls"


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        (pb.Chat(tools_json="["), "chat.tools"),
        (pb.Chat(tools_json="[" * 10**5), "chat.tools"),
        (pb.Chat(tools_json='{"type": "function"}'), "chat.tools"),
        (pb.Chat(tools_json=f'["{"a" * 2**18}"]'), "chat.tools"),
        (pb.Chat(tools_json='["\\ud800"]'), "chat.tools"),
        (pb.Chat(tools_json="[NaN]"), "chat.tools"),
        (pb.Chat(tools_json="[1e999]"), "chat.tools"),
        (pb.Chat(tools_json="[1]"), "chat.tools[0]"),
        (pb.Chat(tools_json=json.dumps([{}] * 129)), "chat.tools"),
        (pb.Chat(tools_json=f"[{deep(65)}]"), "chat.tools[0]"),
        (pb.Chat(tools_json='[{"type": "custom"}]'), "chat.tools[0].type"),
        (pb.Chat(tools_json='[{"type": "function"}]'), "chat.tools[0].function"),
        (pb.Chat(tools_json='[{"type": "function", "function": {}}]'), NAME_OF_TOOL),
        (pb.Chat(tools_json=json.dumps([call("a b", 1)])), NAME_OF_TOOL),
        (pb.Chat(tools_json=json.dumps([call("a\n", 1)])), NAME_OF_TOOL),
        (pb.Chat(tools_json=json.dumps([call("a" * 65, 1)])), NAME_OF_TOOL),
        (pb.Chat(tools_json=json.dumps([call("a", 1), call("a", 2)])), "chat.tools[1].function.name"),
        (pb.Chat(tool_call_form=9), "chat.tool_call_form"),  # type: ignore[arg-type]
        (pb.Chat(messages=[pb.ChatMessage(tool_calls_json="{}")]), CALLS),
        (pb.Chat(messages=[pb.ChatMessage(tool_calls_json=json.dumps([call("a", {})] * 2))]), f"{CALLS}[1].id"),
        (pb.Chat(messages=[pb.ChatMessage(tool_calls_json=json.dumps([call("a", {}, "")]))]), f"{CALLS}[0].id"),
        (
            pb.Chat(messages=[pb.ChatMessage(tool_calls_json=json.dumps([call("a", "[]")]))]),
            f"{CALLS}[0].function.arguments",
        ),
        (
            pb.Chat(messages=[pb.ChatMessage(tool_calls_json=json.dumps([call("a", deep(65))]))]),
            f"{CALLS}[0].function.arguments",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_too_much_or_malformed_is_refused_by_its_name(chat: pb.Chat, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        conversation_from_wire(chat)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("text", {"tools": TOOLS}, "tools"),
        ([1, 2], {"tool_call_form": "hermes"}, "tool_call_form"),
        (MESSAGES, {"tool_call_form": "xml"}, "tool_call_form"),
        (MESSAGES, {"tools": [{1, 2}]}, "tools"),
        ([Message("user", None)], {}, "prompt"),
        ([Message("assistant", None, [{"id": b"x"}])], {}, "prompt"),
    ],
)
def test_the_client_names_what_it_cannot_send(prompt: Any, options: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        build_request(prompt, options)
    assert refused.value.field == field
