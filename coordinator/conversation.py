"""The conversation of a request as its chat template reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coordinator.tools import Json, check_calls, check_tools, read_json
from sequoia.errors import InvalidArgument
from sequoia.v1 import coordinator_pb2 as pb

_FIELD = "chat"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and tools in the shapes of transformers' `apply_chat_template`.

    `expects_hermes_calls`: the caller looks for calls in that form, which the template must teach.
    """

    messages: list[Json]
    tools: list[Json] | None = None
    expects_hermes_calls: bool = False

    @property
    def concerns_tools(self) -> bool:
        """Whether the template has to tell more than who says what."""
        return bool(self.tools) or self.expects_hermes_calls or any(map(is_of_tools, self.messages))


def question(text: str) -> Conversation:
    """A conversation that begins."""
    return Conversation([{"role": "user", "content": text}])


def is_of_tools(message: Json) -> bool:
    """Whether the message is a call or its result."""
    return message["role"] == "tool" or "tool_calls" in message


def conversation_from_wire(chat: pb.Chat) -> Conversation:
    """Raises InvalidArgument naming the part that is wrong."""
    if chat.tool_call_form not in pb.ToolCallForm.values():
        raise InvalidArgument(f"{chat.tool_call_form} is no form of calls", f"{_FIELD}.tool_call_form")
    tools = read_json(chat.tools_json, f"{_FIELD}.tools") if chat.tools_json else None
    return Conversation(
        [_message(each, f"{_FIELD}.messages[{index}]") for index, each in enumerate(chat.messages)],
        (check_tools(tools, f"{_FIELD}.tools") or None) if tools is not None else None,
        chat.tool_call_form == pb.TOOL_CALL_FORM_HERMES,
    )


def _message(message: pb.ChatMessage, field: str) -> Json:
    told: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls_json:
        # What such a message says besides may be nothing at all, which templates tell from an empty text.
        told["content"] = message.content if message.HasField("content") else None
        name = f"{field}.tool_calls"
        told["tool_calls"] = check_calls(read_json(message.tool_calls_json, name), name)
    return told | {name: value for name in ("tool_call_id", "name") if (value := getattr(message, name))}
