"""`sequoia train-draft`: a small draft for any causal LM, trained on what that model itself writes."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sequoia.cli.benchmarks.arguments import add_json, add_target, check_folder, check_least
from sequoia.cli.figures import new_table
from sequoia.cli.steps import Steps
from sequoia.cli.training.recipe import CorpusRecipe, Size, read_openings
from sequoia.engine.distillation.schedule import Schedule
from sequoia.errors import InvalidArgument

if TYPE_CHECKING:
    from sequoia.cli.training.card import Made

_OPENINGS = Path(__file__).parent / "training" / "openings.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_target(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the draft goes; goes on if there")
    parser.add_argument(
        "--size",
        type=_size,
        action="append",
        metavar="LxN",
        help="layers of the target x tokens known (or `all`); several are trained and compared, and the one with the "
        "most predicted tokens per second is kept (default 2x12288, or 2xall; all layers with --steps 0)",
    )
    begun = "a draft of the same target to train further, ours or any model with its tokenizer (default: its layers)"
    parser.add_argument("--train-from", metavar="MODEL", help=begun)
    parser.add_argument("--documents", type=int, default=16384, metavar="N", help="to write (default %(default)s)")
    steps = "of training; 0: the target's own weights over fewer tokens (default %(default)s)"
    parser.add_argument("--steps", type=int, default=8000, metavar="N", help=steps)
    parser.add_argument(
        "--batch-tokens", type=int, default=4096, metavar="N", help="in a step, padding included (default %(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-3, metavar="X", help="the highest (default 0.003)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of text and training (default %(default)s)")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="folder of the text (default: OUT/corpus)")
    parser.add_argument(
        "--question-tokens", type=int, default=96, metavar="N", help="most behind an opening (default %(default)s)"
    )
    parser.add_argument(
        "--answer-tokens", type=int, default=224, metavar="N", help="most of an answer (default %(default)s)"
    )
    parser.add_argument("--openings", type=Path, metavar="FILE", help="JSON object of lists: how questions begin")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE", help="to learn from besides")
    packed = "write matrices in 6 bits, and what is the target's, tokenizer and weights, by the target's name only"
    parser.add_argument("--packed", action="store_true", help=packed)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="to write")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--step-overhead",
        type=float,
        default=0.003,
        metavar="S",
        help="seconds of a step beside the forwards, for the prediction (default %(default)s)",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write, train, measure, keep the best."""
    check_least(arguments, documents=1, steps=0, batch_tokens=64, question_tokens=1, answer_tokens=2, seed=0)
    if not 0.0 < arguments.learning_rate < 1.0:
        raise InvalidArgument(f"is {arguments.learning_rate}; it must be between 0 and 1", "learning-rate")
    if not 0.0 <= arguments.step_overhead < math.inf:
        raise InvalidArgument(f"is {arguments.step_overhead}; it must be seconds of 0 or more", "step-overhead")
    check_folder(arguments.out, "out")
    _check_ours(arguments.out)
    corpus = CorpusRecipe(
        arguments.target,
        arguments.documents,
        arguments.seed,
        read_openings(arguments.openings or _OPENINGS),
        tuple(map(_read, arguments.text)),
        arguments.question_tokens,
        arguments.answer_tokens,
    )
    training = Schedule(arguments.steps, arguments.batch_tokens, arguments.learning_rate, arguments.seed)
    found = _made(arguments, corpus, training)
    if arguments.json:
        print(json.dumps([each.to_dict() for each in found]))
    else:
        Console().print(_table(found), f"\nkept {found[0].size} in {arguments.out}")
    return 0


def _made(arguments: argparse.Namespace, corpus: CorpusRecipe, training: Schedule) -> Sequence[Made]:
    # Imported here: `--help` needs no torch.
    from sequoia.cli.training.making import Workshop

    workshop = Workshop(
        corpus,
        training,
        out=arguments.out,
        corpus_dir=arguments.corpus or arguments.out / "corpus",
        dtype=arguments.dtype,
        device=arguments.device,
        train_from=arguments.train_from,
        is_packed=arguments.packed,
        step_seconds=arguments.step_overhead,
        command=shlex.join(["sequoia", *sys.argv[1:]]),
        steps=Steps(Console(stderr=True)),
    )
    return workshop.make(arguments.size or [])


def _check_ours(out: Path) -> None:
    """Raises InvalidArgument for a folder of something else: a card would replace its README.md."""
    is_ours = any((out / name).exists() for name in ("unfinished", "corpus", "training.json"))
    if out.exists() and not is_ours and (not out.is_dir() or any(out.iterdir())):
        raise InvalidArgument(f"{out} holds something else; name a new folder", "out")


def _table(found: Sequence[Made]) -> Table:
    table = new_table(
        "size", "parameters", "acceptance by rank", "a level", "best plan", "tokens/step", "tokens/s", "vs off"
    )
    for each in found:
        plan, worth = each.worth.plan.chosen, each.worth
        table.add_row(
            str(each.size),
            f"{each.num_parameters / 1e6:.1f} M",
            " ".join(f"{p:.2f}" for p in worth.acceptance[:4]),
            f"{worth.curve.at(1) * 1e3:.2f} ms",
            f"{plan.kind}, {plan.shape.size} x {plan.shape.levels}",
            f"{plan.tokens_per_step:.2f}",
            f"{worth.tokens_per_second:.1f}",
            f"{plan.speedup:.2f}",
        )
    return table


def _size(text: str) -> Size:
    try:
        return Size.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{file} cannot be read: {error}", "text") from error
