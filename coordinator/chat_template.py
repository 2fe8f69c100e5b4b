"""Chat templates: a conversation rendered as the text its model was trained on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from time import thread_time
from types import FrameType
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sequoia.errors import InvalidArgument

_MAX_CHARACTERS = 8 * 2**20
# Jinja's name for code compiled from a string.
_TEMPLATE_FILENAME = "<template>"
# What a template's own mistakes can raise besides TemplateError: it is foreign code.
_TEMPLATE_FAULTS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A model's chat template, rendered in Jinja's immutable sandbox.

    Loops, macros and recursion end after `max_seconds` of processor time, output after 8 Mi characters. Not bounded is
    a single huge operation (`"a" * 10**10`, a string doubled forty times): Python cannot interrupt it. Whoever serves a
    model trusts its template that far.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        max_seconds: float = 1.0,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._max_seconds = max_seconds
        self._now = now

    @cached_property
    def reads_tools(self) -> bool:
        """Whether the template asks for the tools that there are. A broken one may: rendering tells what is wrong."""
        try:
            return "tools" in meta.find_undeclared_variables(self._environment.parse(self._source))
        except TemplateError:
            return True

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The text of a conversation, ready for the assistant's answer. Messages and tools are transformers' shapes.

        Raises InvalidArgument naming `chat` when the template is broken, refuses the messages or exceeds its bounds.
        """
        variables = {
            **self._special_tokens,
            "messages": [dict(each) for each in messages],
            "add_generation_prompt": True,
            # Templates ask whether these are none, which an undefined variable is not.
            "tools": tools and [dict(each) for each in tools],
            "documents": None,
        }
        try:
            return self._render_within_bounds(variables)
        except _TEMPLATE_FAULTS as error:
            raise InvalidArgument(
                f"the model's chat template failed: {error}; change the messages, or send text or token_ids", "chat"
            ) from error

    def _render_within_bounds(self, variables: Mapping[str, Any]) -> str:
        outer = sys.gettrace()
        sys.settrace(_watchdog(self._max_seconds))
        try:
            pieces: list[str] = []
            num_characters = 0
            for piece in self._template.generate(variables):
                num_characters += len(piece)
                if num_characters > _MAX_CHARACTERS:
                    raise TemplateError(f"it wrote more than {_MAX_CHARACTERS} characters")
                pieces.append(piece)
            return "".join(pieces)
        finally:
            sys.settrace(outer)

    @cached_property
    def _template(self) -> Template:
        return self._environment.from_string(self._source)

    @cached_property
    def _environment(self) -> ImmutableSandboxedEnvironment:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: self._now().strftime(format)
        return environment


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; in serving it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _watchdog(max_seconds: float) -> Callable[[FrameType, str, Any], Any]:
    """A trace function: the only way to interrupt a loop that writes nothing, short of a process to kill."""
    deadline = thread_time() + max_seconds

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if thread_time() > deadline:
            raise TemplateError(f"it ran for more than {max_seconds:g} s")
        return watch if frame.f_code.co_filename == _TEMPLATE_FILENAME else None

    return watch


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
