"""Calls of tools told apart from text: whatever the pieces in which an answer comes, and nothing of it lost."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from tool_templates import CLOCK, TOOLS, WEATHER, call

from coordinator.gateway.body import Body
from coordinator.gateway.calls import Arguments, Begun, ForcedCall, Part, Reader, WrittenCalls, reader_of
from coordinator.gateway.conversation import read_messages
from coordinator.gateway.json_objects import ObjectScanner, members
from coordinator.gateway.tool_use import ToolUse, read_tool_use
from sequoia.errors import InvalidArgument

AUTO = ToolUse((WEATHER, CLOCK), "auto", (WEATHER, CLOCK))
ONE = ToolUse((WEATHER, CLOCK), "auto", (WEATHER, CLOCK), allows_several=False)
REQUIRED = ToolUse((WEATHER, CLOCK), "required", (WEATHER, CLOCK))
NAMED = ToolUse((WEATHER, CLOCK), "named", (CLOCK,))


def written(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


COLOGNE = '{"place": "K\\u00f6ln", "unit":"C" }'
NOON = '{ "at": {"hour": 12}}'
WEATHER_CALL, CLOCK_CALL = written("get_weather", COLOGNE), written("set-clock", NOON)

# An answer, what is said in it, and the calls.
ANSWERS: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "text": ("It is warm.\n ", "It is warm.\n ", []),
    "nothing": ("", "", []),
    "blanks": (" \n", " \n", []),
    "a call": (WEATHER_CALL, "", [("get_weather", COLOGNE)]),
    "text, then a call": (f"Let me see.\n\n{WEATHER_CALL}", "Let me see.", [("get_weather", COLOGNE)]),
    "a call, then text": (f"\n{WEATHER_CALL}\n\nSo: ", "So: ", [("get_weather", COLOGNE)]),
    "a text in two": (f"a:\n\n{CLOCK_CALL}\n{CLOCK_CALL}\n b", "a:\n\nb", [("set-clock", NOON)] * 2),
    "two calls": (f"{WEATHER_CALL}\n{CLOCK_CALL}\n", "", [("get_weather", COLOGNE), ("set-clock", NOON)]),
    "text between": (f"a {CLOCK_CALL} b {CLOCK_CALL} c", "a b c", [("set-clock", NOON)] * 2),
    "without blanks": (
        '<tool_call>{"name":"set-clock","arguments":{}}</tool_call>',
        "",
        [("set-clock", "{}")],
    ),
    "the other order": (
        '<tool_call> {"arguments": {"a": [1.50, -0]} , "name": "set-clock"} </tool_call>',
        "",
        [("set-clock", '{"a": [1.50, -0]}')],
    ),
    "the closing in a string": (
        written("get_weather", '{"place": "</tool_call>\\"<tool_call>{"}'),
        "",
        [("get_weather", '{"place": "</tool_call>\\"<tool_call>{"}')],
    ),
    "a backslash at the end of a string": (
        written("get_weather", '{"place": "a\\\\"}'),
        "",
        [("get_weather", '{"place": "a\\\\"}')],
    ),
}
# What stays text, although it looks like a call.
NO_CALLS = {
    "another tool": written("get_time", "{}"),
    "no object": written("get_weather", "[1]"),
    "arguments in a string": written("get_weather", '"{}"'),
    "a third part": '<tool_call>{"name": "get_weather", "arguments": {}, "id": 1}</tool_call>',
    "no arguments": '<tool_call>{"name": "get_weather"}</tool_call>',
    "a name twice": '<tool_call>{"name": "set-clock", "name": "get_weather", "arguments": {}}</tool_call>',
    "no name": '<tool_call>{"name": ["get_weather"], "arguments": {}}</tool_call>',
    "a number": '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
    "no constants": written("get_weather", '{"a": nan}'),
    "a comma too many": written("get_weather", '{"a": 1,}'),
    "xml": "<tool_call>\n<function=get_weather>\n</function>\n</tool_call>",
    "text behind the object": '<tool_call>{"name": "set-clock", "arguments": {}} now</tool_call>',
    "a line in a string": written("get_weather", '{"place": "a\nb"}'),
    "an odd quote": '<tool_call>{"name: "get_weather", "arguments": {}}</tool_call>\n',
    "no closing": '<tool_call>{"name": "get_weather", "arguments": {}}',
    "half a closing": '<tool_call>{"name": "get_weather", "arguments": {}}\n</tool_',
    "half an object": 'so: \n<tool_call>\n{"name": "get_wea',
    "half an opening": "so: \n<tool_ca",
    "an opening alone": "a  <tool_call>",
    "openings": "<tool_call><tool_call>{<tool_call>",
    "nothing in it": "<tool_call></tool_call>",
    "a closing alone": "</tool_call> <",
}


def read(reader: Reader, pieces: Sequence[str]) -> list[Part]:
    """All parts, those of the same kind that stand together as one."""
    found: list[Part] = []
    for part in [*(part for each in pieces for part in reader.push(each)), *reader.finish()]:
        last = found[-1] if found else None
        if isinstance(part, str) and isinstance(last, str):
            found[-1] = last + part
        elif isinstance(part, Arguments) and isinstance(last, Arguments) and part.index == last.index:
            found[-1] = Arguments(last.index, last.text + part.text)
        else:
            found.append(part)
    return found


def said(parts: Sequence[Part]) -> str:
    return "".join(each for each in parts if isinstance(each, str))


def called(parts: Sequence[Part]) -> list[tuple[str, str]]:
    names = {each.index: each.name for each in parts if isinstance(each, Begun)}
    return [(names[each.index], each.text) for each in parts if isinstance(each, Arguments)]


def splits(text: str) -> list[list[str]]:
    """In two at every place, in three at random ones, and letter by letter."""
    generator = random.Random(text)
    places = [sorted(generator.choices(range(len(text) + 1), k=2)) for _ in range(40)]
    in_three = [[text[:a], text[a:b], text[b:]] for a, b in places]
    return [*([text[:at], text[at:]] for at in range(len(text) + 1)), *in_three, list(text)]


@pytest.mark.parametrize("kind", ANSWERS)
def test_calls_are_the_same_wherever_the_pieces_end(kind: str) -> None:
    answer, text, calls = ANSWERS[kind]
    for pieces in splits(answer):
        parts = read(WrittenCalls(AUTO), pieces)
        assert (said(parts), called(parts)) == (text, calls), pieces


@pytest.mark.parametrize("kind", NO_CALLS)
def test_what_is_no_call_is_text_and_hides_none_behind_it(kind: str) -> None:
    for pieces in splits(NO_CALLS[kind]):
        assert read(WrittenCalls(AUTO), pieces) == [NO_CALLS[kind]]
    answer = f"{NO_CALLS[kind]}\n x {CLOCK_CALL}"
    for pieces in splits(answer):
        parts = read(WrittenCalls(AUTO), pieces)
        assert (said(parts), called(parts)) == (f"{NO_CALLS[kind]}\n x", [("set-clock", NOON)]), pieces


def test_text_is_not_held_back_longer_than_it_may_become_a_call() -> None:
    reader = WrittenCalls(AUTO)
    assert list(reader.push("a <b> <tool")) == ["a <b>"]
    assert list(reader.push("s> ")) == [" <tools>"]
    assert list(reader.push('<tool_call>{"name": ')) == []
    assert said(list(reader.push("what"))) == ' <tool_call>{"name": what'
    assert [type(each) for each in reader.push(CLOCK_CALL)] == [Begun, Arguments]


def test_what_follows_a_call_is_left_out_where_one_is_allowed() -> None:
    answer = f"First:\n{WEATHER_CALL}\nthen {CLOCK_CALL}"
    for pieces in splits(answer):
        reader = WrittenCalls(ONE)
        parts = read(reader, pieces)
        assert (said(parts), called(parts)) == ("First:", [("get_weather", COLOGNE)])
        assert reader.finish_reason("length") == "tool_calls"


def test_the_reason_is_calls_unless_a_limit_cut_the_answer() -> None:
    reader = WrittenCalls(AUTO)
    assert reader.finish_reason("stop") == "stop"
    read(reader, [WEATHER_CALL])
    assert (reader.finish_reason("stop"), reader.finish_reason("length")) == ("tool_calls", "length")


FORCED = f' {{ "name" :\t"set-clock"\n,"arguments": {NOON}\n}} '


@pytest.mark.parametrize("use", [REQUIRED, NAMED], ids=["required", "named"])
def test_a_forced_call_streams_its_arguments_as_they_are_written(use: ToolUse) -> None:
    for pieces in splits(FORCED):
        reader = ForcedCall(use)
        parts = read(reader, pieces)
        assert called(parts) == [("set-clock", NOON)]
        assert len(parts) == 2
        assert reader.finish_reason("stop") == ("tool_calls" if use is REQUIRED else "stop")
    letters = ForcedCall(use)
    first = next(i for i, each in enumerate(FORCED) if any(isinstance(p, Arguments) for p in letters.push(each)))
    assert first == FORCED.index(NOON)


@pytest.mark.parametrize("end", range(len(FORCED) + 1))
def test_a_forced_call_that_is_cut_has_its_arguments_as_far_as_they_came(end: int) -> None:
    reader = ForcedCall(NAMED)
    parts = read(reader, [FORCED[:end]])
    start = FORCED.index(NOON)
    assert [each.name for each in parts if isinstance(each, Begun)] == ["set-clock"]
    assert called(parts) == ([("set-clock", NOON[: end - start])] if end > start else [])
    assert reader.finish_reason("length") == "length"
    is_named = end > start
    assert bool(read(ForcedCall(REQUIRED), [FORCED[:end]])) is is_named


def test_ids_are_nine_letters_and_differ() -> None:
    parts = read(reader_of(AUTO), [WEATHER_CALL + CLOCK_CALL])
    ids = [each.call_id for each in parts if isinstance(each, Begun)]
    assert all(len(each) == 9 and each.isalnum() for each in ids)
    assert len(set(ids)) == 2


@pytest.mark.parametrize("text", ['{"a": {"b": "}\\"{"}, "c": [1e9, true, null]}', "{}", '{"": "\\\\"}'])
def test_an_object_is_read_to_its_end_and_no_further(text: str) -> None:
    scanner = ObjectScanner()
    assert scanner.push(f" \n{text}}} x") == len(text) + 2
    assert scanner.is_complete
    found = members(text)
    assert found is not None
    assert {name: json.loads(each.text) for name, each in found.items()} == json.loads(text)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a"}', '{"a": 1', '{"a": 1,}', "{} x", '{"a": 1 "b": 2}', "{1: 2}"])
def test_what_is_no_object_has_no_members(text: str) -> None:
    assert members(text) is None


def test_a_number_that_is_too_large_is_not_converted() -> None:
    found = members(f'{{"a": {"9" * 9999}}}')
    assert found is not None
    assert found["a"].text == "9" * 9999
    assert members("[" * 10**5) is None
    assert members('{"a":' * 10**5) is None


def test_a_long_answer_takes_little_time() -> None:
    reader = WrittenCalls(AUTO)
    body = "<tool_call>" + '{"name": "set-clock", "arguments": {"a": "' + "x" * 100_000
    assert read(reader, list(body)) == [body]


USER = {"role": "user", "content": "How is it?"}
ASKING = {"role": "assistant", "content": None, "tool_calls": [call("a", "{}", "1"), call("b", '{"c": 1}', "2")]}


def result(call_id: str, **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "content": f"of {call_id}", "tool_call_id": call_id, **fields}


def test_results_have_the_names_of_their_tools_and_the_order_of_the_calls() -> None:
    messages = read_messages(Body({"messages": [USER, ASKING, result("2"), result("1", name="a"), USER]}))
    assert [(each.role, each.tool_call_id, each.name, each.content) for each in messages[1:4]] == [
        ("assistant", "", "", None),
        ("tool", "1", "a", "of 1"),
        ("tool", "2", "b", "of 2"),
    ]
    assert messages[1].tool_calls[1]["function"]["arguments"] == {"c": 1}


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([result("1")], "messages[0].tool_call_id"),
        ([USER, {"role": "tool", "content": "x"}], "messages[1].tool_call_id"),
        ([USER, ASKING], "messages[1].tool_calls"),
        ([USER, ASKING, result("1"), USER, result("2")], "messages[1].tool_calls"),
        ([USER, ASKING, result("1"), result("1")], "messages[3].tool_call_id"),
        ([USER, ASKING, result("1"), result("3")], "messages[3].tool_call_id"),
        ([USER, ASKING, result("1", name="b")], "messages[2].name"),
        ([USER, ASKING, result("1", tool_calls=[call("a", "{}")])], "messages[2].tool_calls"),
        ([{**USER, "tool_calls": [call("a", "{}")]}], "messages[0].tool_calls"),
        ([{**USER, "tool_call_id": "1"}], "messages[0].tool_call_id"),
        ([{"role": "assistant", "content": None}], "messages[0].content"),
        ([{"role": "tool", "content": None, "tool_call_id": "1"}], "messages[0].content"),
        ([{"role": "assistant", "tool_calls": 5}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [5]}], "messages[0].tool_calls[0]"),
        ([{"role": "assistant", "tool_calls": [call("a", "{")]}], "messages[0].tool_calls[0].function.arguments"),
        ([{"role": "assistant", "tool_calls": [call("a", "[]")]}], "messages[0].tool_calls[0].function.arguments"),
        ([{"role": "assistant", "tool_calls": [call("a", None)]}], "messages[0].tool_calls[0].function.arguments"),
        ([{"role": "assistant", "tool_calls": [call("a b", "{}")]}], "messages[0].tool_calls[0].function.name"),
        ([{"role": "assistant", "tool_calls": [call("a", "{}", "")]}], "messages[0].tool_calls[0].id"),
        ([{"role": "function", "content": "x", "name": "a"}], "messages[0].role"),
    ],
    ids=str,
)
def test_a_malformed_message_is_refused_by_its_name(messages: list[Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        read_messages(Body({"messages": messages}))
    assert refused.value.field == field


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "a", **function}}


PARAMETERS = "tools[0].function.parameters"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [tool()] * 129}, "tools"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name"),
        ({"tools": [tool(name="a.b")]}, "tools[0].function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type"),
        ({"tools": [{**tool(), "cache": True}]}, "tools[0].cache"),
        ({"tools": [tool(defer=True)]}, "tools[0].function.defer"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
        ({"tools": [tool(description=5)]}, "tools[0].function.description"),
        ({"tools": [tool(parameters=[])]}, PARAMETERS),
        ({"tools": [tool(parameters={"type": "array"})]}, f"{PARAMETERS}.type"),
        ({"tools": [tool(parameters={"properties": {"x": {"$id": "y"}}})]}, PARAMETERS),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "a"}}}, "tool_choice"),
        ({"tools": [], "parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"tools": [tool()], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": 5}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice.function.name"),
        (
            {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "b"}}},
            "tool_choice.function.name",
        ),
        ({"tools": [tool()], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"tools": [tool()], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [tool()], "tool_choice": "required", "min_tokens": 2}, "min_tokens"),
        ({"tools": [tool()], "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_tools_cannot_be_is_refused_by_its_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        read_tool_use(Body(fields))
    assert refused.value.field == field


def test_the_model_is_told_of_functions_what_there_is_to_tell() -> None:
    use = read_tool_use(Body({"tools": [tool(strict=True, description=None, parameters={"$id": {}})], "n": 2}))
    assert use is not None
    assert use.options == {"tools": (tool(parameters={"$id": {}}),), "tool_call_form": "hermes"}


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_or_with_none_to_choose_the_model_hears_of_none(fields: dict[str, Any]) -> None:
    assert read_tool_use(Body(fields)) is None
