"""`sequoia explain`: why a pair is decoded the way it is, and what other trees would bring."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sequoia.cli.access_flags import ACCESS_FLAGS, access_of
from sequoia.cli.explanation import Explanation, Realised, explanation_view
from sequoia.cli.figures import check_plot
from sequoia.cli.plan import add_pair_arguments, address_of
from sequoia.cli.plan_files import FILE_FLAGS, add_file_arguments, plan_from_files, read_file, refuse
from sequoia.planner import TreePlan
from sequoia.rules import ParameterError
from sequoia.topology import Topology, TreeShape

if TYPE_CHECKING:
    from sequoia.v1.coordinator_pb2 import ExplainResponse

_RUNNING_FLAGS = ("address", "rule", "temperature", *ACCESS_FLAGS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of this command. None but --json has a default, so that what was given can be told."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    plot = "draw latency curves, speedup over sizes and levels, and the tree into this .png or .svg"
    parser.add_argument("--plot", type=Path, metavar="FILE", help=plot)
    group = parser.add_argument_group("of a running pair")
    add_pair_arguments(group)
    group.add_argument("--temperature", type=float, metavar="T", help="explain this temperature (default 0)")
    add_file_arguments(parser)
    plan = "instead of the others: a plan as `sequoia plan --acceptance ... --json` prints it"
    parser.add_argument("--plan", type=Path, metavar="FILE", help=plan)


def run(arguments: argparse.Namespace) -> int:
    """Explain, and draw."""
    if arguments.plot is not None:
        check_plot(arguments.plot)
    explanation = _explanation(arguments)
    if arguments.plot is not None:
        _draw(explanation, arguments.plot)
    if arguments.json:
        print(json.dumps(explanation.to_dict()))
    else:
        Console().print(explanation_view(explanation))
    return 0


def _explanation(arguments: argparse.Namespace) -> Explanation:
    from coordinator.speculation import BUILT_IN_TREE

    if arguments.plan is not None:
        others = (*_RUNNING_FLAGS, *FILE_FLAGS)
        refuse(arguments, others, "does not go with --plan, whose file says it all; leave one out")
        return Explanation(_read_plan(arguments.plan), BUILT_IN_TREE)
    if arguments.acceptance is not None:
        refuse(arguments, _RUNNING_FLAGS, "is for a running pair, and --acceptance for numbers alone; leave one out")
        return Explanation(plan_from_files(arguments), BUILT_IN_TREE)
    refuse(arguments, FILE_FLAGS, "is for a plan from numbers alone; give --acceptance FILE too, or leave it out")
    return _of_running_pair(arguments, BUILT_IN_TREE)


def _read_plan(file: Path) -> TreePlan:
    document = read_file(file, "plan")
    try:
        return TreePlan.from_json(document)
    except ValueError as error:
        remedy = "give one object, as `sequoia plan --acceptance ... --json` prints it"
        raise ParameterError(f"{file}: {error}; {remedy}", "--plan") from error


def _of_running_pair(arguments: argparse.Namespace, built_in: Topology) -> Explanation:
    from sequoia.client import Client
    from sequoia.speculation_figures import state_name

    with Client(address_of(arguments), **access_of(arguments)) as client:
        response = client.explain(temperature=arguments.temperature or 0.0, rule=arguments.rule)
    return Explanation(
        plan=_plan_in_force(response),
        built_in=built_in,
        realised=_realised(response),
        situation=response.situation,
        planned_situation=response.planned_situation,
        state=state_name(response.state),
        state_reason=response.state_reason,
        num_ahead_hits=response.num_ahead_hits,
        num_ahead_misses=response.num_ahead_misses,
    )


def _plan_in_force(response: ExplainResponse) -> TreePlan | None:
    from sequoia.errors import FailedPrecondition

    try:
        return TreePlan.from_json(response.plan_json) if response.plan_json else None
    except ValueError as error:
        raise FailedPrecondition(f"the coordinator is of another version: {error}", "plan") from error


def _realised(response: ExplainResponse) -> dict[TreeShape, Realised]:
    """By tree, of those that committed a token."""
    from sequoia.wire import known_shape

    return {
        known_shape(each): Realised(each.num_steps, each.num_tokens, each.seconds)
        for each in response.realised
        if each.num_tokens > 0.0 and each.seconds > 0.0
    }


def _draw(explanation: Explanation, file: Path) -> None:
    if explanation.plan is None:
        raise ParameterError("there is no plan to draw yet; `sequoia plan` makes one", "--plot")
    from sequoia.cli.plan_plot import plot_plan

    plot_plan(explanation.plan, file)
