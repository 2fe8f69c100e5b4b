"""`sequoia selfcheck`: a short proof, on a running system, that no rule changes the target's distribution."""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from sequoia.checks import Drafting, IdentityCheck, LawCheck, SelfCheck, has_16_bits
from sequoia.cli.access_flags import access_of
from sequoia.cli.figures import new_table
from sequoia.cli.generate import add_address
from sequoia.cli.steps import Steps
from sequoia.selfcheck import check_system

_EPILOG = """\
law: three tokens after a fixed prompt, sampled with top_k 4, against their exact probabilities, which plain decoding
tells as logprobs. TV is the total variation distance; exact samples have the expected one on average and exceed the
limit once in 1000 checks. More samples find smaller deviations.
A rule is tested where draft and target disagree: a draft that is always right proves little. In bfloat16 and float16
the limit allows for rounding.
identity: texts of 64 tokens with two trees against the text without speculation.
exit status: 0 all passed, 1 something did not
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of this command."""
    parser.epilog = _EPILOG
    add_address(parser)
    parser.add_argument(
        "--samples", type=int, default=100, metavar="N", help="answers a rule gives (default %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="of what is sampled (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Check, show, and return 0 when everything passed."""
    steps = Steps(Console(stderr=True))
    checking = check_system(
        arguments.address,
        temperature=arguments.temperature,
        num_samples=arguments.samples,
        step=steps.step,
        access=access_of(arguments),
    )
    check = asyncio.run(checking)
    if arguments.json:
        print(json.dumps(to_dict(check)))
    else:
        console = Console()
        console.print(checks_table(check))
        for line in remarks(check):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0 if check.passed else 1


def to_dict(check: SelfCheck) -> dict[str, Any]:
    """Ready for JSON: target, draft, dtype, temperature, passed, laws and identities.

    A law has rule, total_variation, reference (expected, limit), num_outside; an identity rule, dtype, differences.
    Both have drafting (num_answers, num_drafted, fallback_reason), verdict and passed.
    """
    judged = {"laws": [*map(_judged, check.laws)], "identities": [*map(_judged, check.identities)]}
    return {**asdict(check), "passed": check.passed, **judged}


def _judged(check: LawCheck | IdentityCheck) -> dict[str, Any]:
    return {**asdict(check), "verdict": check.verdict, "passed": check.passed}


def checks_table(check: SelfCheck) -> Table:
    """One row a check."""
    table = new_table("rule", "check", "samples", "TV", "expected", "limit", "verdict")
    for law in check.laws:
        figures = (law.total_variation, law.reference.expected, law.reference.limit)
        shown = (f"{each:.3f}" for each in figures)
        table.add_row(law.rule, "law", str(law.drafting.num_answers), *shown, law.verdict)
    for identity in check.identities:
        num_texts = str(identity.drafting.num_answers)
        table.add_row(identity.rule, "identity", num_texts, "", "", "", identity.verdict)
    return table


def remarks(check: SelfCheck) -> list[str]:
    """A line for each check that leaves something to say."""
    told = [(f"{each.rule} law", _law_remark(each)) for each in check.laws]
    told += [(f"{each.rule} identity", _identity_remark(each)) for each in check.identities]
    return [f"{name}: {remark}" for name, remark in told if remark]


def _law_remark(check: LawCheck) -> str:
    if check.num_outside:
        return f"{check.num_outside} samples are impossible under the target"
    return _drafting_remark(check.drafting) if check.verdict == "not checked" else ""


def _identity_remark(check: IdentityCheck) -> str:
    if not check.differences:
        return _drafting_remark(check.drafting) if check.verdict == "not checked" else ""
    first, count = check.differences[0], f"{len(check.differences)} of {check.drafting.num_answers}"
    gap = "" if first.gap is None else f", gap {first.gap:.2g}"
    where = f"first after {first.num_same_tokens} tokens of prompt {first.prompt + 1}, {first.shape}{gap}"
    ties = " at near ties" if check.verdict == "near tie" else ""
    expected = f", as expected in {check.dtype}" if ties and has_16_bits(check.dtype) else ""
    return f"{count} differ{ties}{expected}; {where}"


def _drafting_remark(drafting: Drafting) -> str:
    reason = drafting.fallback_reason or "the draft worker is gone"
    return f"only {drafting.num_drafted} of {drafting.num_answers} answers were drafted ({reason})"
