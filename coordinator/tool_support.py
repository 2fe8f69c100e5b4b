"""What a chat template can tell of tools, found out by having it tell something."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coordinator.conversation import Conversation, is_of_tools
from coordinator.tools import Json
from sequoia.errors import InvalidArgument

if TYPE_CHECKING:
    from coordinator.chat_template import ChatTemplate

OPENING, CLOSING = "<tool_call>", "</tool_call>"
# As the instructions of such templates spell it out, in this order or the other:
# {"name": <function-name>, "arguments": <args-json-object>}.
_TAUGHT = re.compile(rf"{OPENING}\s*\{{(?=[^{{}}]*\bname\b)(?=[^{{}}]*\barguments\b)[^{{}}]*\}}\s*{CLOSING}")
_NAME, _KEY, _RESULT = "probe_function", "probe_key", "probe result"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A function.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "A text."}}},
    },
}
# Some templates take ids of nine letters and digits only.
_CALL_ID = "probe0001"


@dataclass(frozen=True, slots=True)
class ToolSupport:
    """What the model gets to see."""

    tells_tools: bool
    teaches_hermes_calls: bool
    tells_calls: bool
    tells_results: bool
    wants_text: bool  # arguments as the JSON text that OpenAI has, not as objects

    def told(self, conversation: Conversation) -> Conversation:
        """The conversation as this template reads it. Raises InvalidArgument naming what it would not tell."""
        if conversation.tools and not self.tells_tools:
            raise InvalidArgument("the model's chat template has no place for tools; leave them out", "chat.tools")
        if conversation.expects_hermes_calls and not self.teaches_hermes_calls:
            reason = f"the model's chat template does not teach calls of the form {OPENING}...{CLOSING}"
            raise InvalidArgument(f"{reason}; require a call, or name a function", "chat.tool_call_form")
        messages = [self._message(each, f"chat.messages[{i}]") for i, each in enumerate(conversation.messages)]
        return Conversation(messages, conversation.tools, conversation.expects_hermes_calls)

    def _message(self, message: Json, field: str) -> Json:
        if not is_of_tools(message):
            return message
        if message["role"] == "tool" and not self.tells_results:
            reason = "the model's chat template does not tell results; say them as the user"
            raise InvalidArgument(reason, f"{field}.role")
        if "tool_calls" not in message:
            return message
        if not self.tells_calls:
            reason = "the model's chat template does not tell calls; write them into content"
            raise InvalidArgument(reason, f"{field}.tool_calls")
        calls = message["tool_calls"]
        return {**message, "tool_calls": [_as_text(each) for each in calls] if self.wants_text else calls}


def probe(template: ChatTemplate) -> ToolSupport:
    """Have the template tell a tool, a call of it and the result, and look for them."""
    asked = [{"role": "user", "content": "A question."}]
    taught = _rendered(template, asked, [_TOOL])
    objects = _rendered(template, [*asked, *_called({_KEY: 1})])
    # Python's way to write an object is no JSON.
    wants_text = not objects or f"{{'{_KEY}'" in objects
    told = _rendered(template, [*asked, *_called(json.dumps({_KEY: 1}))]) if wants_text else objects
    return ToolSupport(
        tells_tools=template.reads_tools,
        teaches_hermes_calls=_TAUGHT.search(taught) is not None,
        tells_calls=_NAME in told and _KEY in told,
        tells_results=_RESULT in told,
        wants_text=wants_text,
    )


def _called(arguments: Any) -> list[Json]:
    call = {"id": _CALL_ID, "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": _RESULT, "tool_call_id": _CALL_ID, "name": _NAME},
    ]


def _as_text(call: Json) -> Json:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _rendered(template: ChatTemplate, messages: list[Json], tools: list[Json] | None = None) -> str:
    try:
        return template.render(messages, tools)
    except InvalidArgument:
        return ""
