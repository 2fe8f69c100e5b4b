"""The messages of a chat: what a chat template can say of them, and nothing silently left out."""

from __future__ import annotations

from typing import Any

from coordinator.gateway.body import Body
from sequoia.errors import InvalidArgument
from sequoia.options import Message

# OpenAI's "developer" is what "system" was called before, and chat templates know that name.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_KNOWN = ("role", "content")


def read_messages(body: Body) -> list[Message]:
    """The conversation, oldest first. Raises InvalidArgument naming the message, and the part of it."""
    messages = body.items("messages")
    if not messages:
        raise InvalidArgument("give at least one message", "messages")
    return [_message(each, f"messages[{index}]") for index, each in enumerate(messages)]


def _message(raw: Any, name: str) -> Message:
    if not isinstance(raw, dict):
        raise InvalidArgument("is no object with role and content", name)
    message = Body(raw, name)
    role = message.text("role")
    if role not in _ROLES:
        reason = f"{role!r:.40} is none of {', '.join(_ROLES)}; results of tools are not served"
        raise InvalidArgument(reason, message.name_of("role"))
    # What a client sends back as it got it has many fields, all of them empty.
    for field, value in raw.items():
        if field not in _KNOWN and value not in (None, [], ""):
            raise InvalidArgument("is not served: the chat template is not told of it", message.name_of(field))
    return Message(_ROLES[role], _content(message))


def _content(message: Body) -> str:
    if not isinstance(message.fields.get("content"), list):
        text = message.text("content")
        if text is None:
            raise InvalidArgument("give the text", message.name_of("content"))
        return text
    parts = message.items("content") or []
    return "".join(_part(each, f"{message.name_of('content')}[{index}]") for index, each in enumerate(parts))


def _part(raw: Any, name: str) -> str:
    kind = raw.get("type") if isinstance(raw, dict) else raw
    text = Body(raw, name).text("text") if kind == "text" else None
    if text is None:
        raise InvalidArgument(f"{kind!r:.40} is not served; parts are {{'type': 'text', 'text': ...}}", name)
    return text
