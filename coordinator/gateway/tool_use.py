"""What a chat may do with tools: the fields `tools`, `tool_choice` and `parallel_tool_calls`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from coordinator.gateway.body import Body
from coordinator.gateway.call_schema import call_schema, check_parameters
from coordinator.tools import Json, check_name, check_tools
from sequoia.errors import InvalidArgument
from sequoia.options import RequestOptions

Choice = Literal["auto", "required", "named"]
# What the model is told of a function. `strict` is about the answer, which is held to the parameters either way.
_TOLD = ("name", "description", "parameters")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools that the model is told of, and which of them it may call, or has to."""

    tools: tuple[Json, ...]
    choice: Choice
    callable_tools: tuple[Json, ...]
    allows_several: bool = True

    @property
    def names(self) -> frozenset[str]:
        """Of the functions that may be called."""
        return frozenset(each["function"]["name"] for each in self.callable_tools)

    @property
    def is_forced(self) -> bool:
        """Whether the answer is one call, whatever the model would say."""
        return self.choice != "auto"

    @property
    def options(self) -> RequestOptions:
        """What the coordinator is asked."""
        if self.is_forced:
            return RequestOptions(tools=self.tools, json_schema=call_schema(self.callable_tools))
        return RequestOptions(tools=self.tools, tool_call_form="hermes")


def read_tool_use(body: Body) -> ToolUse | None:
    """None where the model hears of no tools. Raises InvalidArgument naming the field."""
    given_tools = check_tools(body.items("tools") or [], "tools")
    tools = [_tool(each, f"tools[{index}]") for index, each in enumerate(given_tools)]
    choice, named = _choice(body)
    several = body.flag("parallel_tool_calls")
    if not tools:
        asked = {"tool_choice": choice not in (None, "none"), "parallel_tool_calls": several is not None}
        if wrong := [name for name, is_asked in asked.items() if is_asked]:
            raise InvalidArgument("goes with tools; give them, or leave it out", wrong[0])
    if not tools or choice == "none":
        return None
    found = tuple(each for each in tools if named in (None, each["function"]["name"]))
    if not found:
        raise InvalidArgument(f"{named!r} is none of tools", "tool_choice.function.name")
    use = ToolUse(tuple(tools), choice or "auto", found, several is not False)
    _check_company(body, use)
    return use


def _tool(tool: Json, field: str) -> Json:
    """As the model is told of it."""
    _check_names(tool, ("type", "function"), field)
    function = Body(tool["function"], f"{field}.function")
    _check_names(function.fields, (*_TOLD, "strict"), f"{field}.function")
    function.flag("strict")
    function.text("description")
    if (parameters := function.group("parameters")) is not None:
        check_parameters(parameters.fields, function.name_of("parameters"))
    told = {name: value for name in _TOLD if (value := function.fields.get(name)) is not None}
    return {"type": "function", "function": told}


def _choice(body: Body) -> tuple[Choice | Literal["none"] | None, str | None]:
    """With the name of the function that has to be called."""
    if not isinstance(body.fields.get("tool_choice"), dict):
        kind = body.text("tool_choice")
        if kind not in (None, "none", "auto", "required"):
            raise InvalidArgument(f"{kind!r:.40} is none of none, auto, required and a function", "tool_choice")
        return kind, None  # type: ignore[return-value]
    choice = Body(body.fields["tool_choice"], "tool_choice")
    _check_names(choice.fields, ("type", "function"), "tool_choice")
    if (kind := choice.text("type")) != "function":
        raise InvalidArgument(f"{kind!r:.40} is not served; give a function", "tool_choice.type")
    function = choice.group("function") or Body({}, "tool_choice.function")
    _check_names(function.fields, ("name",), "tool_choice.function")
    return "named", check_name(function.fields.get("name"), "tool_choice.function.name")


def _check_company(body: Body, use: ToolUse) -> None:
    """Raises InvalidArgument for what the answer cannot be held to as well."""
    if (body.fields.get("response_format") or {}) not in ({}, {"type": "text"}):
        raise InvalidArgument("goes without tools, unless tool_choice is none", "response_format")
    for name in ("min_tokens", "ignore_eos") if use.is_forced else ():
        if body.fields.get(name):
            raise InvalidArgument("goes without a call that is required, which may have to end before", name)


def _check_names(group: Mapping[str, Any], known: tuple[str, ...], field: str) -> None:
    for name, value in group.items():
        if name not in known and value is not None:
            raise InvalidArgument("is not served; leave it out", f"{field}.{name}")
