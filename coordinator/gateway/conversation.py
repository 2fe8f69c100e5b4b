"""The messages of a chat: what a chat template can say of them, and nothing silently left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coordinator.gateway.body import Body
from coordinator.tools import check_calls
from sequoia.errors import InvalidArgument
from sequoia.options import Message

# OpenAI's "developer" is what "system" was called before, and chat templates know that name.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_KNOWN = {"assistant": ("role", "content", "tool_calls"), "tool": ("role", "content", "tool_call_id", "name")}


def read_messages(body: Body) -> list[Message]:
    """The conversation, oldest first. Raises InvalidArgument naming the message, and the part of it."""
    messages = body.items("messages")
    if not messages:
        raise InvalidArgument("give at least one message", "messages")
    read = [_message(each, f"messages[{index}]") for index, each in enumerate(messages)]
    return list(_with_results(read))


def _message(raw: Any, name: str) -> Message:
    if not isinstance(raw, dict):
        raise InvalidArgument("is no object with role and content", name)
    message = Body(raw, name)
    role = message.text("role")
    if role not in _ROLES:
        raise InvalidArgument(f"{role!r:.40} is none of {', '.join(_ROLES)}", message.name_of("role"))
    # What a client sends back as it got it has many fields, all of them empty.
    for field, value in raw.items():
        if field not in _KNOWN.get(role, ("role", "content")) and value not in (None, [], ""):
            raise InvalidArgument("is not served: the chat template is not told of it", message.name_of(field))
    calls = check_calls(message.items("tool_calls") or [], message.name_of("tool_calls"))
    content = None if calls and raw.get("content") is None else _content(message)
    call_id, tool = message.text("tool_call_id") or "", message.text("name") or ""
    return Message(_ROLES[role], content, calls, call_id, tool)


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


def _with_results(messages: Sequence[Message]) -> Iterator[Message]:
    """All of them, the results of calls in the order of those, whose ids most templates do not tell."""
    called_at, called, results = 0, dict[str, str](), dict[str, Message]()
    for index, message in enumerate((*messages, None)):
        if message is not None and message.role == "tool":
            result = _result(message, called, f"messages[{index}]")
            if result.tool_call_id in results:
                raise InvalidArgument("has been answered before", f"messages[{index}].tool_call_id")
            results[result.tool_call_id] = result
            continue
        if missing := [each for each in called if each not in results]:
            reason = f"{missing[0]!r:.80} has no result in the messages behind it"
            raise InvalidArgument(reason, f"messages[{called_at}].tool_calls")
        yield from (results[each] for each in called)
        if message is not None:
            called_at, results = index, {}
            called = {each["id"]: each["function"]["name"] for each in message.tool_calls}
            yield message


def _result(message: Message, called: Mapping[str, str], name: str) -> Message:
    """With the name of the tool, which some templates tell."""
    call_id = message.tool_call_id
    if call_id not in called:
        raise InvalidArgument(f"{call_id!r:.80} is no call of the assistant just before", f"{name}.tool_call_id")
    if message.name not in ("", called[call_id]):
        raise InvalidArgument(f"{message.name!r:.80} is not what {call_id!r:.80} calls", f"{name}.name")
    return Message("tool", message.content, (), call_id, called[call_id])
