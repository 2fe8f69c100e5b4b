"""Arms in turn: the order, the warm-up, and an arm that fails."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sequoia.cli.benchmarks.arm_measuring import Arm, ArmAnswer, Measured, measure
from sequoia.cli.benchmarks.asking import Asking
from sequoia.cli.benchmarks.peer_process import PeerFailed
from sequoia.cli.benchmarks.prompt_set import BenchPrompt

PROMPTS = tuple(BenchPrompt("code", name, "") for name in "abc")


@dataclass
class ScriptedArm:
    """Notes its name at every answer, and fails from one of them on."""

    name: str
    log: list[str]
    fails_at: int = 1000
    num_tokens: list[int] = field(default_factory=list)

    def answer(self, prompt: BenchPrompt, max_tokens: int) -> ArmAnswer:
        self.log.append(self.name)
        if len(self.num_tokens) == self.fails_at:
            raise PeerFailed("out of memory")
        self.num_tokens.append(max_tokens)
        return ArmAnswer((5, 6), 1.0, 0.5)


def measured(arms: list[ScriptedArm], num_rounds: int = 1) -> Measured:
    typed: list[Arm] = [*arms]
    return measure(typed, Asking(PROMPTS, False, num_rounds, 32), lambda done, total: None)


def test_every_arm_takes_every_place() -> None:
    log: list[str] = []
    measured([ScriptedArm(name, log) for name in ("off", "plan", "chain")])
    turns = np.array(log[3:]).reshape(3, 3)
    assert [sorted(turn) for turn in turns] == [["chain", "off", "plan"]] * 3
    assert [sorted(place) for place in turns.T] == [["chain", "off", "plan"]] * 3


def test_a_short_answer_goes_before_and_does_not_count() -> None:
    arm = ScriptedArm("off", [])
    found = measured([arm], num_rounds=2)
    assert arm.num_tokens == [8, *[32] * 6]
    assert [(each.prompt.name, each.round) for each in found.samples] == [
        (name, turn) for turn in (0, 1) for name in "abc"
    ]


def test_an_arm_that_fails_is_left_out_and_the_others_go_on() -> None:
    log: list[str] = []
    found = measured([ScriptedArm("off", log), ScriptedArm("peer", log, fails_at=2)])
    assert found.unavailable == {"peer": "out of memory"}
    assert [each.arm for each in found.samples] == ["off"] * 3
    assert log.count("peer") == 3, "nobody asks it again"
