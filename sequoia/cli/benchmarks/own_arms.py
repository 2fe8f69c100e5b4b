"""Our own arms on a running system: plain decoding, the plan, its best chain, fixed shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sequoia.acceptance import PRIOR
from sequoia.alternatives import best_chain
from sequoia.cli.benchmarks.arm_measuring import OFF, ArmAnswer
from sequoia.cli.benchmarks.candidates import shapes
from sequoia.cli.benchmarks.prompt_set import BenchPrompt
from sequoia.cli.shape_names import dynamic_shape, in_words
from sequoia.client import Client, Generation, Prompt, Speculation
from sequoia.errors import FailedPrecondition, InvalidArgument
from sequoia.optimal_tree import Rows, optimal_tree
from sequoia.planner import MAX_LEVELS, TreePlan
from sequoia.topology import Topology, TreeShape

PLAN, CHAIN = "plan", "chain"
_SEED = 0
_SIZES = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True, slots=True)
class OwnArm:
    """One way to speculate, with the same seed for all arms."""

    name: str
    temperature: float
    speculation: Speculation
    client: Client
    prompts: Mapping[BenchPrompt, Prompt]

    @property
    def settings(self) -> str:
        """In words."""
        tree = self.speculation
        return f"speculation {tree}" if isinstance(tree, str) else in_words(tree)

    def answer(self, prompt: BenchPrompt, max_tokens: int) -> ArmAnswer:
        """Raises SequoiaError: without the system there is nothing to compare with."""
        generation = self.client.generate(
            self.prompts[prompt],
            max_tokens=max_tokens,
            temperature=self.temperature,
            seed=_SEED if self.temperature else None,
            speculation=self.speculation,
        )
        return _answer(generation)


def plan_in_force(client: Client, temperature: float) -> TreePlan | None:
    """At that temperature. Raises FailedPrecondition for one of another version."""
    document = client.explain(temperature=temperature).plan_json
    try:
        return TreePlan.from_json(document) if document else None
    except ValueError as error:
        raise FailedPrecondition(f"the coordinator is of another version: {error}", "plan") from error


def ways(plan: TreePlan | None, names: Sequence[str], shape_names: Sequence[str]) -> dict[str, Speculation | None]:
    """By arm, plain decoding first; None for the chain where no plan tells which is best."""
    known: dict[str, Speculation | None] = {PLAN: "auto", CHAIN: best_chain(plan.inputs, MAX_LEVELS) if plan else None}
    acceptance = plan.inputs.acceptance if plan else (PRIOR,)
    trees = {name: named_shape(name, acceptance) for name in shape_names}
    return {OFF: "off", **{name: known[name] for name in names}, **trees}


def named_shape(name: str, acceptance: Rows = (PRIOR,)) -> TreeShape:
    """As in 6x3: the best tree of 6 nodes and at most 3 levels for that acceptance; as in 16x5d4: a dynamic one; or a
    name of `bench shapes`.

    Raises InvalidArgument naming `shape`.
    """
    if sizes := _SIZES.fullmatch(name):
        return _best_of(acceptance, *map(int, sizes.groups()))
    try:
        if dynamic := dynamic_shape(name):
            return dynamic
    except ValueError as error:
        raise InvalidArgument(f"{name}: {error}", "shape") from error
    known = {each: tree for each, tree in shapes(acceptance).items() if each != OFF}
    if name not in known:
        raise InvalidArgument(
            f"{name!r} is neither NODESxLEVELS, as in 6x3, nor NODESxLEVELSdWIDTH, nor one of {', '.join(known)}",
            "shape",
        )
    return known[name]


def _best_of(acceptance: Rows, size: int, levels: int) -> Topology:
    if not 2 <= levels <= size:
        raise InvalidArgument(f"{size}x{levels} is no tree: give 2 levels or more, and at least as many nodes", "shape")
    try:
        return optimal_tree(acceptance, size, levels)
    except ValueError as error:
        raise InvalidArgument(str(error), "shape") from error


def _answer(generation: Generation) -> ArmAnswer:
    usage, figures = generation.usage, generation.speculation
    return ArmAnswer(
        token_ids=generation.token_ids,
        seconds=usage.total_seconds,
        first_token_seconds=usage.time_to_first_token_seconds,
        num_steps=figures.num_steps,
        num_step_tokens=figures.num_steps + figures.num_accepted_tokens,
        stage_seconds=figures.stage_seconds,
    )
