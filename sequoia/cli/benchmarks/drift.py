"""`sequoia bench drift`: what a quantised target does to the text, against the same target in bfloat16."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from coordinator.conversation import question
from sequoia.cli.benchmarks.arguments import add_json, add_target, check_least
from sequoia.cli.benchmarks.prompt_set import BenchPrompt, prompt_set
from sequoia.cli.figures import new_table
from sequoia.cli.steps import Steps
from sequoia.config import ENGINES

if TYPE_CHECKING:
    from coordinator.text import TextCodec
    from sequoia.cli.subject import Subject
    from sequoia.cli.text_drift import Drift, GreedyText

_QUANTIZATIONS = ("int8", "int4")
_DTYPE = "bfloat16"
_CONTEXT_LENGTH = 2048
# The lengths of text for which the table tells on how many prompts nothing has changed.
_LENGTHS = (8, 16, 32, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_target(parser)
    parser.add_argument(
        "--quantization",
        dest="quantizations",
        action="append",
        choices=_QUANTIZATIONS,
        help="of the target; repeatable (default: both)",
    )
    parser.add_argument("--engine", default="auto", choices=ENGINES, help=f"of the {_DTYPE} target (default auto)")
    parser.add_argument("--prompts", type=int, metavar="N", help="per category (default: all)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="per text, at most (default %(default)s)")
    parser.add_argument("--raw", action="store_true", help="prompts are text to continue, no chat template")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write texts, feed them to the rounded targets, print."""
    check_least(arguments, tokens=1, **({} if arguments.prompts is None else {"prompts": 1}))
    steps = Steps(Console(stderr=True))
    texts, engine = _texts(arguments, steps)
    quantizations = dict.fromkeys(arguments.quantizations or _QUANTIZATIONS)
    found = [_drift(arguments.target, each, texts, steps) for each in quantizations]
    if arguments.json:
        settings = {"target": arguments.target, "dtype": _DTYPE, "engine": engine, "max_tokens": arguments.tokens}
        print(json.dumps({**settings, "results": [each.to_dict() for each in found]}))
    else:
        Console().print(drift_table(found, arguments.tokens))
    return 0


def _texts(arguments: argparse.Namespace, steps: Steps) -> tuple[list[GreedyText], str]:
    """What the unrounded target writes, and the engine that runs it. Its memory is free afterwards."""
    # Imported here, as below: `--help` needs no torch.
    from sequoia.cli import text_drift

    target = _load(arguments.target, arguments.engine, "none", steps)
    prompts = [_encoded(target.codec, prompt, arguments.raw) for prompt in prompt_set(arguments.prompts)]
    with steps.step(f"writing {len(prompts)} texts of {arguments.tokens} tokens") as on_progress:
        return text_drift.write(target, prompts, arguments.tokens, on_progress), target.decoder_name


def _drift(reference: str, quantization: str, texts: Sequence[GreedyText], steps: Steps) -> Drift:
    """Under one rounded target, whose memory is free afterwards."""
    from sequoia.cli import text_drift

    rounded = _load(reference, "auto", quantization, steps)
    with steps.step(f"feeding {len(texts)} texts to it") as on_progress:
        return text_drift.compare(rounded, quantization, texts, on_progress)


def _load(reference: str, engine: str, quantization: str, steps: Steps) -> Subject:
    from sequoia.cli.subject import load

    precision = _DTYPE if quantization == "none" else quantization
    with steps.step(f"loading {reference} in {precision}"):
        return load(
            reference,
            dtype=_DTYPE,
            device="cpu",
            engine=engine,
            quantization=quantization,
            context_length=_CONTEXT_LENGTH,
        )


def _encoded(codec: TextCodec, prompt: BenchPrompt, is_raw: bool) -> tuple[int, ...]:
    return codec.encode(prompt.text) if is_raw else codec.encode_chat(question(prompt.text))


def drift_table(found: Sequence[Drift], max_tokens: int) -> Table:
    """A row a quantisation."""
    lengths = [length for length in _LENGTHS if length < max_tokens] + [max_tokens]
    same_text = [f"first {length}" for length in lengths]
    table = new_table("target", "positions", "same argmax", "KL, nats", "largest", *same_text)
    for each in found:
        texts = (f"{each.num_equal_texts(length)} of {len(each.texts)}" for length in lengths)
        divergences = f"{each.mean_divergence:.2g}", f"{each.divergences[-1]:.2g}"
        table.add_row(each.quantization, str(each.num_positions), f"{each.argmax_share:.1%}", *divergences, *texts)
    table.caption = (
        f"along greedy texts of the {_DTYPE} target; KL: mean KL(p || p of the quantised target) at T = 1; first N: on "
        "how many prompts the first N tokens of greedy text are the same"
    )
    return table
