"""The `sequoia` command: one module a sub-command, loaded only when it is the one asked for.

Exit status: 0 done, 2 a wrong argument or setting, 1 any other failure, 130 interrupted, 141 the reader of the output
went away. A failure is one line on stderr, `error: field: what is wrong`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

_COMMANDS = {
    "demo": "start the system, stream one answer, show what speculation did, stop",
    "up": "start the system on this machine and keep it running",
    "gateway": "serve the OpenAI API over HTTP, before a running system",
    "generate": "continue a prompt on a running system",
    "chat": "talk to a running system in the terminal, and see what speculation does",
    "plan": "find the best tree: measure a running pair and keep its trees in Redis, or plan from numbers alone",
    "explain": "show why a pair is decoded the way it is, and what other trees would bring",
    "token": "make a token for a client of the coordinator, and the lines that let it in",
    "train-draft": "make a small draft for a model, trained on what the model itself writes",
    "doctor": "look at this machine, two models or a running system: what is wrong, and what to do about it",
    "selfcheck": "prove on a running system that no rule changes the target's distribution",
    "bench": "measure how fast a pair is, beside plain decoding and other engines; or what a named benchmark tells",
    "loadtest": "many clients at a time, with speculation and without in turn: throughput, latencies, memory",
}
_EPILOG = "exit status: 0 done, 1 failed, 2 wrong argument, 130 interrupted · sequoia COMMAND --help says more"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Wrong usage raises SystemExit(2), as argparse does."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["bench"]:
        from sequoia.cli.bench import with_name

        arguments = ["bench", *with_name(arguments[1:])]
    try:
        parsed = _parser(arguments).parse_args(arguments)
        return _run(parsed.run, parsed)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python would flush what is left at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(run: Callable[[argparse.Namespace], int], parsed: argparse.Namespace) -> int:
    from sequoia.rules import ParameterError

    try:
        status = run(parsed)
        sys.stdout.flush()
        return status
    except ParameterError as error:
        return _fail(f"{error.field}: {error.message}", 2)
    # Looked up only when something was raised: it loads grpc, which planning from numbers alone does without.
    except importlib.import_module("sequoia.errors").SequoiaError as error:
        return _fail(str(error), 2 if error.code.name == "INVALID_ARGUMENT" else 1)


def _fail(problem: str, status: int) -> int:
    from sequoia.redaction import redacted

    print(f"error: {redacted(problem)}", file=sys.stderr, flush=True)
    return status


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # `--tree -1,0,0` is a flag with a value, not two flags.
        self._negative_number_matcher = re.compile(r"-\d")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help shows what is possible)\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print("sequoia", version("sequoia-serving"))
        except PackageNotFoundError:
            print("sequoia (a source tree that is not installed)")
        parser.exit()


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sequoia", description="Speculative decoding as a service, with optimal token trees.", epilog=_EPILOG
    )
    parser.add_argument("--version", nargs=0, action=_Version, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if arguments[:1] == [name]:
            module = importlib.import_module(f"sequoia.cli.{name.replace('-', '_')}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
