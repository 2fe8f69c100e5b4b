"""Tools that a model may call, and calls that it made: JSON of OpenAI's shape, read within bounds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from sequoia.errors import InvalidArgument
from sequoia.nesting import is_deeper

MAX_TOOLS = 128
MAX_CALLS = 128
MAX_JSON_BYTES = 2**18
MAX_DEPTH = 64

Json = dict[str, Any]
_NAME = re.compile("[a-zA-Z0-9_-]{1,64}")


def read_json(text: str, field: str) -> Any:
    """What the text says. Raises InvalidArgument naming the field for what is too long, or no JSON in UTF-8."""
    if (size := len(text.encode())) > MAX_JSON_BYTES:
        raise InvalidArgument(f"has {size} bytes; at most {MAX_JSON_BYTES}", field)
    try:
        value = json.loads(text, parse_constant=_no_constant)
        # JSON can write halves of surrogate pairs, which no tokenizer reads, and numbers that no template can.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"is no JSON: {error}", field) from error
    return value


def check_tools(raw: Any, field: str) -> list[Json]:
    """The tools as they are told to the model. Raises InvalidArgument naming the part that is wrong."""
    tools = _objects(raw, field, MAX_TOOLS)
    names = [_checked_tool(tool, f"{field}[{index}]") for index, tool in enumerate(tools)]
    _check_unique(names, field, "function.name")
    return tools


def check_calls(raw: Any, field: str) -> list[Json]:
    """The calls as templates read them: with arguments that are objects, also where they came as text.

    Raises InvalidArgument naming the part that is wrong.
    """
    calls = [_checked_call(call, f"{field}[{index}]") for index, call in enumerate(_objects(raw, field, MAX_CALLS))]
    _check_unique([call["id"] for call in calls], field, "id")
    return calls


def check_name(value: Any, field: str) -> str:
    """The name of a function. Raises InvalidArgument naming the field for what is none."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidArgument(f"{value!r:.80} is no name: 1 to 64 of a-z, A-Z, 0-9, _ and -", field)
    return value


def _checked_tool(tool: Json, field: str) -> str:
    function = _function(tool, field)
    if not isinstance(function.get("description") or "", str):
        raise InvalidArgument("is not a string", f"{field}.function.description")
    if not isinstance(function.get("parameters") or {}, dict):
        raise InvalidArgument("is no JSON schema, which is an object", f"{field}.function.parameters")
    return check_name(function.get("name"), f"{field}.function.name")


def _checked_call(call: Json, field: str) -> Json:
    function, call_id = _function(call, field), call.get("id")
    if not isinstance(call_id, str) or not call_id:
        raise InvalidArgument("give the id of the call", f"{field}.id")
    name = check_name(function.get("name"), f"{field}.function.name")
    arguments = _arguments(function.get("arguments"), f"{field}.function.arguments")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _function(part: Json, field: str) -> Json:
    if part.get("type") != "function":
        raise InvalidArgument(f"{part.get('type')!r:.40} is not served; tools are functions", f"{field}.type")
    function = part.get("function")
    if not isinstance(function, dict):
        raise InvalidArgument("give an object with the function's name", f"{field}.function")
    return function


def _arguments(arguments: Any, field: str) -> Json:
    read = read_json(arguments, field) if isinstance(arguments, str) else arguments
    if not isinstance(read, dict):
        raise InvalidArgument("is no JSON object", field)
    if is_deeper(read, MAX_DEPTH):
        raise InvalidArgument(f"is nested deeper than {MAX_DEPTH} levels", field)
    return read


def _objects(raw: Any, field: str, most: int) -> list[Json]:
    if not isinstance(raw, list):
        raise InvalidArgument("is not a list", field)
    if len(raw) > most:
        raise InvalidArgument(f"has {len(raw)} entries; at most {most} are served", field)
    for index, each in enumerate(raw):
        if not isinstance(each, dict):
            raise InvalidArgument("is not an object", f"{field}[{index}]")
        if is_deeper(each, MAX_DEPTH):
            raise InvalidArgument(f"is nested deeper than {MAX_DEPTH} levels", f"{field}[{index}]")
    return raw


def _check_unique(values: Sequence[str], field: str, part: str) -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise InvalidArgument(f"{value!r:.80} is there twice", f"{field}[{index}].{part}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not in JSON")
