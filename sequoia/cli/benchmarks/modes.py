"""How a benchmark's requests choose their tokens, and the fixed trees that it has them speculate with."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sequoia.acceptance import PRIOR
from sequoia.cli.benchmarks.arm_measuring import OFF
from sequoia.cli.benchmarks.asking import Asking
from sequoia.cli.benchmarks.own_arms import named_shape
from sequoia.cli.benchmarks.prompt_set import BenchPrompt
from sequoia.client import Client, Generation, Prompt, SpeculationFigures
from sequoia.errors import InvalidArgument
from sequoia.rules import COUPLED, GREEDY, RULES
from sequoia.speculation_figures import TreeUsage
from sequoia.topology import Topology, TreeShape

# Fewer steps with the tree in an answer are those at its end.
_LEAST_STEPS = 3
_SEED = 0
_NUM_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Mode:
    """A rule at a temperature."""

    rule: str
    temperature: float

    @property
    def name(self) -> str:
        """For people."""
        return self.rule if self.rule == GREEDY.name else f"{self.rule}, T = {self.temperature:g}"

    @property
    def is_repeatable(self) -> bool:
        """Whether two answers to one prompt have one text: greedy ones, and those with a seed."""
        return self.rule in (GREEDY.name, COUPLED.name)

    def ask(self, client: Client, prompt: Prompt, tree: TreeShape, max_tokens: int, seed: int = _SEED) -> Generation:
        """An answer of `max_tokens`; plain decoding with a root-only tree. `seed` is for the rule that takes one."""
        return client.generate(
            prompt,
            max_tokens=max_tokens,
            temperature=self.temperature,
            rule=self.rule,
            seed=seed if self.rule == COUPLED.name else None,
            ignore_eos=True,
            speculation=tree if tree.size > 1 else "off",
        )


@dataclass(frozen=True, slots=True)
class TreeWorkload:
    """Fixed trees, a root-only one for plain decoding, under some modes, on the same prompts."""

    modes: tuple[Mode, ...]
    trees: Mapping[str, TreeShape]
    asking: Asking

    @property
    def cells(self) -> list[tuple[Mode, str]]:
        """Every mode with every tree, by its name."""
        return [(mode, shape) for mode in self.modes for shape in self.trees]

    def warm_up(self, client: Client) -> None:
        """A short answer of every cell, which does not count."""
        for mode, shape in self.cells:
            mode.ask(client, self.asking.form(self.asking.prompts[0]), self.trees[shape], _NUM_WARM_UP_TOKENS)

    def answer(self, client: Client, mode: Mode, shape: str, prompt: BenchPrompt) -> Generation:
        """That cell's to that prompt."""
        return mode.ask(client, self.asking.form(prompt), self.trees[shape], self.asking.max_tokens)


def add_modes(parser: argparse.ArgumentParser, defaults: Sequence[str]) -> None:
    """--rule and --temperature."""
    rules = f"repeatable (default {', '.join(defaults)})"
    parser.add_argument("--rule", dest="rules", action="append", choices=tuple(RULES), help=rules)
    temperature = "of every rule but greedy (default %(default)s)"
    parser.add_argument("--temperature", type=float, default=0.6, metavar="T", help=temperature)


def modes(arguments: argparse.Namespace, defaults: Sequence[str]) -> tuple[Mode, ...]:
    """What `add_modes` collected. Raises InvalidArgument naming `temperature`."""
    if arguments.temperature <= 0.0:
        raise InvalidArgument("must be above 0: at 0 there is the rule greedy", "temperature")
    rules = dict.fromkeys(arguments.rules or defaults)
    return tuple(Mode(rule, 0.0 if rule == GREEDY.name else arguments.temperature) for rule in rules)


def add_shapes(parser: argparse.ArgumentParser, defaults: Sequence[str]) -> None:
    """--shape."""
    shape = (
        f"{OFF}, NODESxLEVELS, as in 6x3, a dynamic tree, as in 16x5d4, or a name of `sequoia bench shapes`; repeatable"
    )
    parser.add_argument(
        "--shape", dest="shapes", action="append", metavar="SHAPE", help=f"{shape} (default {', '.join(defaults)})"
    )


def trees(arguments: argparse.Namespace, defaults: Sequence[str]) -> dict[str, TreeShape]:
    """What `add_shapes` collected, by name. Raises InvalidArgument naming `shape`."""
    names: Iterable[str] = dict.fromkeys(arguments.shapes or defaults)
    return {name: Topology.root_only() if name == OFF else named_shape(name, (PRIOR,)) for name in names}


def usage_of(figures: SpeculationFigures, tree: TreeShape) -> TreeUsage | None:
    """An answer's steps with that very tree; None where they are too few to tell."""
    return next((each for each in figures.trees if each.shape == tree and each.num_steps >= _LEAST_STEPS), None)
