"""A plan from numbers alone: acceptance and latency curves in JSON files. Needs no running system, and no grpc."""

from __future__ import annotations

import argparse
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sequoia.hardware import LatencyCurve
from sequoia.optimal_tree import Rows
from sequoia.planner import TreePlan, choose
from sequoia.pricing import PlanInputs
from sequoia.rules import ParameterError

_Value = TypeVar("_Value")

_FILES = ("acceptance", "verify_curve", "draft_curve")
FILE_FLAGS = (*_FILES, "rtt_draft", "rtt_verify", "host", "max_size", "max_levels")
# What a laptop searches in seconds. Beyond either, one more node or level brings next to nothing.
MAX_SIZE, MAX_LEVELS = 4096, 128
_MAX_BYTES = 2**22
# Widths and seconds beyond these are a mistake: another unit, or a damaged file.
_MAX_WIDTH = 10**7
_LEAST_SECONDS, _MOST_SECONDS = 1e-12, 1e6
# A sum of rounded probabilities may exceed 1 by this much.
_ROUNDING = 1e-9


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of FILE_FLAGS."""
    group = parser.add_argument_group(
        "from numbers alone", "No running system is needed. Sizes and levels count the root."
    )
    acceptance = "JSON: [p0, p1, ...], P(the child of that rank is accepted | its parent was), or such rows by depth"
    group.add_argument("--acceptance", type=Path, metavar="FILE", help=acceptance)
    verify = 'JSON: {"1": seconds, "2": ...} of a target forward by the tokens in it; no tree goes beyond its end'
    group.add_argument("--verify-curve", type=Path, metavar="FILE", help=verify)
    draft = "the same of a draft forward by its rows, which are the nodes with children of one level"
    group.add_argument("--draft-curve", type=Path, metavar="FILE", help=draft)
    group.add_argument("--rtt-draft", type=float, metavar="S", help="round trip to the draft, in seconds (default 0)")
    group.add_argument("--rtt-verify", type=float, metavar="S", help="round trip to the target, in seconds (default 0)")
    group.add_argument("--host", type=float, metavar="S", help="all else in a drafted step, in seconds (default 0)")
    size = f"largest tree, in nodes (default: the verify curve's end; never more than that, or than {MAX_SIZE})"
    group.add_argument("--max-size", type=int, metavar="N", help=size)
    levels = f"deepest tree, in levels (default: whatever the size allows; never more than {MAX_LEVELS})"
    group.add_argument("--max-levels", type=int, metavar="D", help=levels)


def refuse(arguments: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raises ParameterError for the first of these flags that was given."""
    for name in names:
        if getattr(arguments, name) is not None:
            raise ParameterError(reason, flag(name))


def flag(name: str) -> str:
    """As it is typed."""
    return f"--{name.replace('_', '-')}"


def plan_from_files(arguments: argparse.Namespace) -> TreePlan:
    """What the flags of FILE_FLAGS describe. Raises ParameterError naming the flag that is wrong."""
    inputs = PlanInputs(
        acceptance=_of_file(arguments, "acceptance", _rows),
        verify_curve=_of_file(arguments, "verify_curve", _curve),
        draft_curve=_of_file(arguments, "draft_curve", _curve),
        draft_rtt_seconds=_seconds(arguments, "rtt_draft"),
        verify_rtt_seconds=_seconds(arguments, "rtt_verify"),
        host_seconds=_seconds(arguments, "host"),
    )
    max_size, max_levels = _limit(arguments, "max_size", MAX_SIZE), _limit(arguments, "max_levels", MAX_LEVELS)
    return choose(inputs, max_size=max_size, max_levels=max_levels)


def read_file(file: Path, name: str) -> bytes:
    """Raises ParameterError naming the flag when the file cannot be read, or is no such file by its size."""
    try:
        with file.open("rb") as opened:
            content = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ParameterError(f"{file}: {error.strerror}; give a JSON file that can be read", flag(name)) from error
    if len(content) > _MAX_BYTES:
        raise ParameterError(f"{file} is larger than {_MAX_BYTES} bytes; give the numbers only", flag(name))
    return content


def _of_file(arguments: argparse.Namespace, name: str, parse: Callable[[Any], _Value]) -> _Value:
    file = getattr(arguments, name)
    if file is None:
        raise ParameterError(f"is missing; {', '.join(map(flag, _FILES))} go together", flag(name))
    content = read_file(file, name)
    try:
        document = json.loads(content, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"{file} is not JSON: {error}", flag(name)) from error
    try:
        return parse(document)
    except ValueError as error:
        raise ParameterError(f"{file}: {error}", flag(name)) from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number; measure it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{reprlib.repr(key)} is there {count} times; keep one")
    return dict(pairs)


def _rows(document: Any) -> Rows:
    if not isinstance(document, list) or not document:
        raise ValueError(f"must be a list such as [0.7, 0.1], or of such rows, not {reprlib.repr(document)}")
    rows = document if isinstance(document[0], list) else [document]
    return tuple(map(_row, rows))


def _row(document: Any) -> tuple[float, ...]:
    if not isinstance(document, list) or not document:
        raise ValueError(f"a row must be a list of probabilities such as [0.7, 0.1], not {reprlib.repr(document)}")
    row = tuple(map(_number, document))
    for rank, probability in enumerate(row):
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"rank {rank} is {probability:g}; give probabilities, from 0 to 1")
    if (total := math.fsum(row)) > 1.0 + _ROUNDING:
        raise ValueError(f"a row sums to {total:g}; siblings exclude each other: give a sum of at most 1")
    return row


def _curve(document: Any) -> LatencyCurve:
    if not isinstance(document, dict) or not document:
        raise ValueError(f'must be an object such as {{"1": 0.02, "8": 0.03}}, not {reprlib.repr(document)}')
    curve = LatencyCurve.from_dict({_width(key): _forward_seconds(key, each) for key, each in document.items()})
    if curve.num_tokens[0] != 1:
        raise ValueError(f'starts at width {curve.num_tokens[0]}; measure "1" too: plain decoding is compared with it')
    return curve


def _width(key: str) -> str:
    if not re.fullmatch("[1-9][0-9]*", key) or len(key) > len(str(_MAX_WIDTH)) or int(key) > _MAX_WIDTH:
        raise ValueError(f"{reprlib.repr(key)} is no width; give whole numbers of tokens from 1 to {_MAX_WIDTH}")
    return key


def _forward_seconds(key: str, document: Any) -> float:
    seconds = _number(document)
    if not _LEAST_SECONDS <= seconds <= _MOST_SECONDS:
        bounds = f"from {_LEAST_SECONDS:g} to {_MOST_SECONDS:g}"
        raise ValueError(f"width {key} takes {seconds:g} s; give the seconds of a forward, {bounds}")
    return seconds


def _number(document: Any) -> float:
    try:
        if isinstance(document, int | float) and not isinstance(document, bool) and math.isfinite(document):
            return float(document)
    except OverflowError:
        pass
    raise ValueError(f"{reprlib.repr(document)} is not a number that can be used; give a finite one")


def _seconds(arguments: argparse.Namespace, name: str) -> float:
    seconds: float = getattr(arguments, name) or 0.0
    if not 0.0 <= seconds <= _MOST_SECONDS:
        raise ParameterError(f"is {seconds:g}; give seconds, from 0 to {_MOST_SECONDS:g}", flag(name))
    return seconds


def _limit(arguments: argparse.Namespace, name: str, most: int) -> int:
    limit: int | None = getattr(arguments, name)
    if limit is not None and limit < 1:
        raise ParameterError(f"is {reprlib.repr(limit)}; give 1 (the root) or more", flag(name))
    return most if limit is None else min(limit, most)
