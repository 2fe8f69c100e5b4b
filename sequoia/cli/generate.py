"""`sequoia generate`: one prompt to a running system, its answer to stdout as it comes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from sequoia.cli.access_flags import access_of, add_access
from sequoia.cli.shape_names import read_shape
from sequoia.client import DEFAULT_ADDRESS, Chunk, Client, Generation, Message, Prompt, Speculation
from sequoia.errors import InvalidArgument
from sequoia.rules import RULES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of this command."""
    parser.add_argument("prompt", metavar="PROMPT", help="a user's message; - reads it from stdin")
    parser.add_argument("--raw", action="store_true", help="PROMPT is plain text to continue, no chat template")
    add_address(parser)
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to generate")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy decoding")
    parser.add_argument("--top-p", type=float, metavar="P", help="nucleus mass")
    parser.add_argument("--top-k", type=int, metavar="K", help="keep the K most likely tokens; 0 keeps all")
    parser.add_argument("--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the first")
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: fewer tokens that were seen")
    parser.add_argument("--presence-penalty", type=float, metavar="X", help="subtracted from logits of answered tokens")
    parser.add_argument("--frequency-penalty", type=float, metavar="X", help="the same, once per occurrence")
    parser.add_argument(
        "--logit-bias", action="append", default=[], type=_bias, metavar="ID=X", help="added to a logit; repeatable"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="same seed, same text, whatever the draft and the tree")
    parser.add_argument("--min-tokens", type=int, metavar="N", help="nothing ends the answer before")
    parser.add_argument("--ignore-eos", action="store_true", default=None, help="go on at end-of-sequence tokens")
    parser.add_argument(
        "--stop-token-id", action="append", default=[], type=int, metavar="ID", help="a token that ends it; repeatable"
    )
    parser.add_argument("--json-schema", type=Path, metavar="FILE", help="the JSON schema that the answer is held to")
    parser.add_argument("--logprobs", type=int, metavar="N", help="with --json: logprobs, and the N likeliest tokens")
    parser.add_argument("--rule", choices=tuple(RULES), help="how trees are grown and verified (default: the server's)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    parser.add_argument("--speculation", choices=("auto", "off", "tree"), help="default: auto, or tree with --tree")
    parser.add_argument(
        "--tree",
        metavar="TREE",
        help="the tree to use: each node's parent, as in -1,0,0,1; or NODESxLEVELSdWIDTH, as in 16x5d4, a dynamic one, "
        "with least chance and least gain 48x24d2c.05g.8",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object at the end, figures included")
    output.add_argument("--stats", action="store_true", help="print a table of figures on stderr at the end")


def add_address(parser: argparse.ArgumentParser) -> None:
    """Declare --address, whose default comes from SEQUOIA_ADDRESS, and what lets us in there."""
    default = os.environ.get("SEQUOIA_ADDRESS", DEFAULT_ADDRESS)
    parser.add_argument("--address", default=default, help=f"the coordinator (default {default}; or SEQUOIA_ADDRESS)")
    add_access(parser)


def run(arguments: argparse.Namespace) -> int:
    """Generate and print."""
    with Client(arguments.address, **access_of(arguments)) as client:
        chunks = client.stream(
            _prompt(arguments),
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            min_p=arguments.min_p,
            repetition_penalty=arguments.repetition_penalty,
            presence_penalty=arguments.presence_penalty,
            frequency_penalty=arguments.frequency_penalty,
            logit_bias=dict(arguments.logit_bias),
            seed=arguments.seed,
            min_tokens=arguments.min_tokens,
            ignore_eos=arguments.ignore_eos,
            stop=arguments.stop,
            stop_token_ids=arguments.stop_token_id,
            logprobs=arguments.logprobs,
            json_schema=_schema(arguments.json_schema),
            rule=arguments.rule,
            speculation=_speculation(arguments),
        )
        if arguments.json:
            *_, last = chunks
            assert last.generation is not None
            print(json.dumps(last.generation.to_dict(), ensure_ascii=False))
            return 0
        generation = print_as_it_comes(chunks)
    if arguments.stats:
        from rich.console import Console

        from sequoia.cli.figures import figures_table

        Console(stderr=True).print(figures_table(generation))
    return 0


def print_as_it_comes(chunks: Iterable[Chunk]) -> Generation:
    """Print the text of a stream, and return what its last chunk carries."""
    generation = None
    for chunk in chunks:
        print(chunk.text, end="", flush=True)
        generation = chunk.generation
    print(flush=True)
    assert generation is not None, "a stream without a finish raises"
    return generation


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    return int(token_id), float(bias)


def _schema(file: Path | None) -> str | None:
    try:
        return file.read_text("utf-8") if file else None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{file} cannot be read: {error}", "json-schema") from error


def _prompt(arguments: argparse.Namespace) -> Prompt:
    text = arguments.prompt
    if text == "-":
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"stdin is not UTF-8: {error}", "prompt") from error
    return text if arguments.raw else [Message("user", text)]


def _speculation(arguments: argparse.Namespace) -> Speculation:
    if arguments.tree is None:
        return arguments.speculation or "auto"
    if arguments.speculation not in (None, "tree"):
        raise InvalidArgument(f"cannot be used with --speculation {arguments.speculation}", "tree")
    try:
        return read_shape(arguments.tree)
    except ValueError as error:
        reason = f"{arguments.tree!r} is not a tree such as -1,0,0,1 or 16x5d4: {error}"
        raise InvalidArgument(reason, "tree") from error
