"""The JSON schema of one call of a tool: what an answer is held to that has to be one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.tools import Json
from sequoia.errors import InvalidArgument

# OpenAI's meaning of a function that says nothing of parameters.
_NO_PARAMETERS: Json = {"type": "object", "properties": {}, "additionalProperties": False}


def call_schema(tools: Sequence[Json]) -> Json:
    """Of {"name": one of the tools', "arguments": what its parameters admit}, the name first."""
    calls = [_call(each["function"]) for each in tools]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def check_parameters(parameters: Mapping[str, Any], field: str) -> None:
    """Raises InvalidArgument naming the part for parameters that are no object's, or that name schemas of their own."""
    if (kind := parameters.get("type", "object")) != "object":
        raise InvalidArgument(f"{kind!r:.40} is not 'object', which arguments are", f"{field}.type")
    # Two schemas of one name are one to the library that reads them.
    level: list[Any] = [parameters]
    while level:
        if any(isinstance(each, dict) and isinstance(each.get("$id"), str) for each in level):
            raise InvalidArgument("has a $id, which is not served here; leave it out", field)
        groups = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [each for group in groups for each in group]


def _call(function: Json) -> Json:
    name, parameters = function["name"], function.get("parameters", _NO_PARAMETERS)
    return {
        "type": "object",
        # With a name of its own it is a document of its own: `#/$defs/...` within it means what it meant there.
        "properties": {"name": {"const": name}, "arguments": {"type": "object", **parameters, "$id": f"tool:{name}"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
