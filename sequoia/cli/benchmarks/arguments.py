"""What several benchmarks ask for, and how they refuse it before the minutes that a measurement takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from sequoia.config import ENGINES, QUANTIZATIONS
from sequoia.errors import InvalidArgument


def add_target(parser: argparse.ArgumentParser, *other_names: str, required: bool = True) -> None:
    """--target, and other names that the flag has."""
    parser.add_argument(
        "--target",
        *other_names,
        dest="target",
        required=required,
        metavar="MODEL",
        help="packaged name, hub id, folder or GGUF file",
    )


def add_draft(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--draft and --draft-quantization."""
    parser.add_argument("--draft", required=required, metavar="MODEL", help="the same; may be the target itself")
    parser.add_argument("--draft-quantization", choices=QUANTIZATIONS, default="none")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """--dtype."""
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))


def add_engine(parser: argparse.ArgumentParser) -> None:
    """--engine."""
    parser.add_argument("--engine", default="auto", choices=ENGINES)


def add_json(parser: argparse.ArgumentParser, what: str = "object") -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help=f"print one JSON {what}")


def check_least(arguments: argparse.Namespace, **least: int) -> None:
    """Raises InvalidArgument naming the first flag that is below its least value."""
    for name, value in least.items():
        if getattr(arguments, name) < value:
            raise InvalidArgument(f"is {getattr(arguments, name)}; it must be {value} or more", name.replace("_", "-"))


def check_folder(file: Path | None, field: str) -> None:
    """Raises InvalidArgument naming `field` for a file in a folder that does not exist."""
    if file is not None and not file.absolute().parent.is_dir():
        raise InvalidArgument(f"there is no folder {file.absolute().parent}", field)


def pair_title(target: str, draft: str, draft_quantization: str) -> str:
    """A plot's title."""
    precision = "" if draft_quantization == "none" else f" in {draft_quantization}"
    return f"{Path(target).name} drafted by {Path(draft).name}{precision}"
