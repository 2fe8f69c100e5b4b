"""What a benchmark asks of a system: which prompts, in which form, how often, and for how many tokens."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from sequoia.cli.benchmarks.arguments import check_least
from sequoia.cli.benchmarks.prompt_set import BenchPrompt, prompt_set
from sequoia.client import Message, Prompt

_MAX_TOKENS, _QUICK_MAX_TOKENS, _QUICK_PROMPTS = 64, 24, 1


@dataclass(frozen=True, slots=True)
class Asking:
    """Every prompt in every round."""

    prompts: tuple[BenchPrompt, ...]
    is_raw: bool  # prompts are text to continue, no chat template
    num_rounds: int
    max_tokens: int

    @property
    def num_answers(self) -> int:
        """Of each that is asked."""
        return len(self.prompts) * self.num_rounds

    def rounds(self) -> Iterator[tuple[int, BenchPrompt]]:
        """The number of the round and the prompt, round by round."""
        return ((number, prompt) for number in range(self.num_rounds) for prompt in self.prompts)

    def form(self, prompt: BenchPrompt) -> Prompt:
        """As a client sends it."""
        return prompt.text if self.is_raw else [Message("user", prompt.text)]


def add_asking(parser: argparse.ArgumentParser) -> None:
    """--prompts, --max-tokens, --rounds, --raw and --quick."""
    parser.add_argument("--prompts", type=int, metavar="N", help="per category (default: all; 1 with --quick)")
    tokens = f"per answer, at most (default {_MAX_TOKENS}; {_QUICK_MAX_TOKENS} with --quick)"
    parser.add_argument("--max-tokens", type=int, metavar="N", help=tokens)
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="answers a prompt (default %(default)s)")
    parser.add_argument("--raw", action="store_true", help="prompts are text to continue, no chat template")
    parser.add_argument("--quick", action="store_true", help="few prompts, short answers, hasty plans: a first look")


def asking(arguments: argparse.Namespace) -> Asking:
    """What `add_asking` collected. Raises InvalidArgument naming the flag that is wrong."""
    num_prompts, max_tokens = arguments.prompts, arguments.max_tokens
    if num_prompts is None:
        num_prompts = _QUICK_PROMPTS if arguments.quick else None
    else:
        check_least(arguments, prompts=1)
    if max_tokens is None:
        max_tokens = _QUICK_MAX_TOKENS if arguments.quick else _MAX_TOKENS
    else:
        check_least(arguments, max_tokens=2)
    check_least(arguments, rounds=1)
    return Asking(prompt_set(num_prompts), arguments.raw, arguments.rounds, max_tokens)
