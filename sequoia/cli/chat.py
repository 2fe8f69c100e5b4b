"""`sequoia chat`: a conversation in the terminal, which shows what speculation does for it."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing

from rich.console import Console

from sequoia.cli.access_flags import access_of
from sequoia.cli.chat_view import AnswerView, legend
from sequoia.cli.generate import add_address
from sequoia.client import Client, Message
from sequoia.errors import InvalidArgument, SequoiaError

_HELP = "Ctrl-C ends an answer, Ctrl-D the conversation; /new begins another one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of this command."""
    parser.epilog = _HELP
    add_address(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of an answer (default %(default)s)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy decoding")
    parser.add_argument("--top-p", type=float, metavar="P", help="nucleus mass")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answers to the same words")
    parser.add_argument("--speculation", choices=("auto", "off", "tree"), default="auto", help="default: auto")
    parser.add_argument(
        "--show-speculation", action="store_true", help="colour what was accepted from the draft, and what was not"
    )


def run(arguments: argparse.Namespace) -> int:
    """Ask and answer until the end of the input."""
    console = Console(highlight=False, soft_wrap=False)
    with Client(arguments.address, **access_of(arguments)) as client:
        model = client.describe_pair().verify.model
        if console.is_terminal:
            console.print(f"{model} at {arguments.address}; {_HELP}", style="dim", markup=False)
            if arguments.show_speculation:
                console.print(legend())
        _converse(client, console, arguments)
    return 0


def _converse(client: Client, console: Console, arguments: argparse.Namespace) -> None:
    beginning = [Message("system", arguments.system)] if arguments.system else []
    conversation = list(beginning)
    while (said := _next_line(console)) is not None:
        if said == "/new":
            conversation = list(beginning)
        elif said:
            question = [*conversation, Message("user", said)]
            answer = _answer(client, console, question, arguments)
            # A question that was not answered is not part of the conversation.
            conversation = [*question, Message("assistant", answer)] if answer else conversation


def _next_line(console: Console) -> str | None:
    """What is said next; None at the end."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        # Gives input() a history and arrow keys.
        import readline  # noqa: F401
    try:
        return input("\n> " if is_terminal else "").strip()
    except (EOFError, KeyboardInterrupt):
        console.file.write("\n" if is_terminal else "")
        return None
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"stdin is not UTF-8: {error}", "prompt") from error


def _answer(client: Client, console: Console, question: list[Message], arguments: argparse.Namespace) -> str:
    """The answer, as far as it came: an interrupt ends it."""
    chunks = client.stream(
        question,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        speculation=arguments.speculation,
        # The bytes of tokens, by which text is told apart, come with logprobs.
        logprobs=0 if arguments.show_speculation else None,
    )
    text = ""
    with closing(chunks), AnswerView(console, shows_speculation=arguments.show_speculation) as view:
        try:
            for chunk in chunks:
                view.show(chunk)
                text += chunk.text
        except KeyboardInterrupt:
            return text
        except SequoiaError as error:
            if not sys.stdin.isatty() or isinstance(error, InvalidArgument):
                raise
            console.print(f"error: {error}", style="red", markup=False)
    return text
