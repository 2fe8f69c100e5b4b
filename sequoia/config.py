"""Settings: one frozen dataclass a process, filled once in main() from flags and SEQUOIA_* variables."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from sequoia.redaction import redacted

Settings = TypeVar("Settings")

# How a worker can compute, in the order of preference; see sequoia/engine/decoders.py.
ENGINES = ("auto", "native", "graphs", "lean", "transformers")
QUANTIZATIONS = ("none", "int8", "int4")
# Where a target's weights are while it works; see sequoia/engine/offload.
OFFLOADS = ("none", "disk", "host", "auto")
# What a draft worker serves that has no model: what a session's own tokens repeat.
MODEL_FREE = "ngram"


@dataclass(frozen=True, slots=True)
class _Doc:
    """What a flag means, and the values it is limited to."""

    text: str
    choices: tuple[str, ...] = ()


def setting(default: Any, text: str, *, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with the help text of its flag. `default=MISSING` makes it required."""
    return field(default=default, metadata={"doc": _Doc(text, choices)})


def load(settings: type[Settings], prog: str, argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Fill `settings`: a flag wins over its SEQUOIA_* variable, which wins over the default.

    A field that is a settings dataclass itself is a group: its flags begin with its name, `--draft-model`; its
    variables do not, so that SEQUOIA_MODEL counts for all groups. A bad or missing value ends the process with status 2
    and one line that names the flag and the variable.
    """
    parser = argparse.ArgumentParser(prog=prog, description=settings.__doc__)
    add_flags(parser, settings)
    return fill(settings, parser.parse_args(argv), environ)


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """The first half of `load`, for a parser that is somebody else's: declare the flags."""
    _add_flags(parser, settings, "")


def fill(settings: type[Settings], arguments: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """The second half of `load`: the settings from what the flags and the environment say."""
    try:
        return _fill(settings, "", vars(arguments), environ)
    except ValueError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """End the process with status 2 and one line on stderr, in which secrets are hidden."""
    print(f"error: {redacted(message)}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def num_bytes(text: str) -> int:
    """`2GiB`, `512MiB` or a number of bytes. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(|[KMGT]i?B)", text.strip())
    if not found:
        raise ValueError(f"{text!r} is no size; write 2GiB, 512MiB or a number of bytes")
    unit = found[2]
    base = 1024 if "i" in unit else 1000
    return int(float(found[1]) * base ** (" KMGT".index(unit[0]) if unit else 0))


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(name: str) -> str:
    return "SEQUOIA_" + name.upper()


def _add_flags(parser: argparse._ActionsContainer, settings: type, prefix: str) -> None:
    for each, kind in _fields(settings):
        if dataclasses.is_dataclass(kind):
            _add_flags(parser.add_argument_group(each.name), kind, f"{prefix}{each.name}_")
        else:
            _add_flag(parser, each, kind, _flag(prefix + each.name))


def _fields(settings: type) -> list[tuple[Field[Any], type]]:
    assert dataclasses.is_dataclass(settings)
    types = get_type_hints(settings)
    return [(each, types[each.name]) for each in dataclasses.fields(settings)]


def _fill(settings: type[Settings], prefix: str, flags: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    values = {
        each.name: _fill(kind, f"{prefix}{each.name}_", flags, environ)
        if dataclasses.is_dataclass(kind)
        else _value(each, kind, flags[prefix + each.name], environ, _flag(prefix + each.name))
        for each, kind in _fields(settings)
    }
    try:
        return settings(**values)
    except ValueError as error:
        # The settings of a group name their flags as if they were alone.
        raise ValueError(str(error).replace("--", _flag(prefix))) from error


def _add_flag(parser: argparse._ActionsContainer, each: Field[Any], kind: type, flag: str) -> None:
    doc: _Doc = each.metadata["doc"]
    default = "required" if each.default is MISSING else f"default: {each.default!r}"
    text = f"{doc.text} ({default}; or {_variable(each.name)})".replace("%", "%%")
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    else:
        parser.add_argument(flag, default=None, help=text, metavar="|".join(doc.choices) or None)


def _value(each: Field[Any], kind: type, raw: Any, environ: Mapping[str, str], flag: str) -> Any:
    if raw is None:
        raw = environ.get(_variable(each.name))
    where = f"{flag} ({_variable(each.name)})"
    if raw is None:
        if each.default is MISSING:
            fail(f"{where} is required: {each.metadata['doc'].text}")
        return each.default
    value = _convert(raw, kind, where)
    choices = each.metadata["doc"].choices
    if choices and value not in choices:
        fail(f"{where} is {value!r}; it must be one of {', '.join(choices)}")
    return value


def _convert(raw: str | bool, kind: type, where: str) -> Any:
    if kind is bool and isinstance(raw, str):
        lowered = raw.lower()
        if lowered not in ("1", "0", "true", "false", "yes", "no"):
            fail(f"{where} is {raw!r}; it must be true or false")
        return lowered in ("1", "true", "yes")
    try:
        return kind(raw)
    except ValueError:
        fail(f"{where} is {raw!r}; it must be of type {kind.__name__}")
