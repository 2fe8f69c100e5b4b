"""The selfcheck: its statistics against laws that are known, and the whole of it on a running system."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from itertools import product

import numpy as np
import pytest
from conftest import System, serving

from sequoia.access import Access
from sequoia.border import Context
from sequoia.checks import Difference, Drafting, IdentityCheck, Law, LawCheck, SelfCheck, check_law, simulate
from sequoia.cli import main
from sequoia.cli.selfcheck import remarks, to_dict
from sequoia.errors import Internal
from sequoia.selfcheck import Step
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import coordinator_pb2_grpc
from sequoia.v1.worker_pb2 import WorkerDescription

TRIPLES = tuple(product((5, 6, 7, 8), repeat=3))
WEIGHTS = np.random.default_rng(1).dirichlet(np.full(len(TRIPLES), 0.5))
LAW = Law((1,), dict(zip(TRIPLES, WEIGHTS.tolist(), strict=True)), at_stake={}, rounding=0.0)
DRAFTED = Drafting(num_answers=200, num_drafted=200, fallback_reason="")


def check(samples: Counter[tuple[int, ...]], *, law: Law = LAW, drafting: Drafting = DRAFTED) -> LawCheck:
    return check_law("sequoia", samples, law, simulate(law, samples.total()), drafting)


def draw(weights: np.ndarray) -> Counter[tuple[int, ...]]:
    counts = np.random.default_rng(2).multinomial(200, weights)
    return Counter(dict(zip(TRIPLES, counts.tolist(), strict=True)))


def test_samples_of_the_law_are_exact() -> None:
    found = check(draw(WEIGHTS))
    assert (found.verdict, found.passed) == ("exact", True)
    assert found.total_variation == pytest.approx(found.reference.expected, abs=0.05)


def test_samples_of_another_law_are_biased() -> None:
    sharpened = WEIGHTS**2 / (WEIGHTS**2).sum()
    found = check(draw(sharpened))
    assert (found.verdict, found.passed) == ("BIASED", False)
    assert found.num_outside == 0


def test_one_impossible_sample_is_biased() -> None:
    found = check(draw(WEIGHTS) + Counter({(5, 6, 9): 1}))
    assert found.total_variation < found.reference.limit
    assert (found.verdict, found.num_outside) == ("BIASED", 1)


def test_a_token_across_a_nearly_tied_cut_is_not_impossible() -> None:
    law = Law(LAW.prompt, LAW.p, at_stake={(5, 6): 0.01}, rounding=0.0)
    found = check(draw(WEIGHTS) + Counter({(5, 6, 9): 1}), law=law)
    assert (found.verdict, found.num_outside) == ("exact", 0)


def test_the_limit_is_passed_once_in_a_thousand_times() -> None:
    counts = np.random.default_rng(3).multinomial(200, WEIGHTS, size=20_000)
    distances = np.abs(counts / 200 - WEIGHTS).sum(axis=1) / 2
    reference = simulate(LAW, 200)
    assert distances.mean() == pytest.approx(reference.expected, rel=0.01)
    assert 5e-4 < (distances > reference.limit).mean() < 2e-3


def test_probabilities_that_do_not_sum_to_one_are_refused() -> None:
    with pytest.raises(Internal, match=r"sum to 0\.9000000"):
        Law((1,), {(5, 6, 7): 0.9}, at_stake={}, rounding=0.0)


def test_answers_that_were_hardly_drafted_prove_nothing() -> None:
    found = check(draw(WEIGHTS), drafting=Drafting(200, 99, "draft: not ready yet"))
    assert (found.verdict, found.passed) == ("not checked", False)


@pytest.mark.parametrize(
    ("dtype", "gap", "verdict"),
    [
        ("float32", 1e-4, "near tie"),
        ("float32", 0.1, "DIFFERENT"),
        ("float32", None, "DIFFERENT"),
        ("bfloat16", None, "near tie"),
    ],
)
def test_a_difference_is_excused_by_a_near_tie_only(dtype: str, gap: float | None, verdict: str) -> None:
    found = IdentityCheck("greedy", dtype, (Difference(0, "tree", 16, gap),), Drafting(6, 6, ""))
    assert (found.verdict, found.passed) == (verdict, verdict == "near tie")


def failed() -> SelfCheck:
    late = check(draw(WEIGHTS), drafting=Drafting(200, 9, "draft: not ready yet"))
    greedy = IdentityCheck("greedy", "float32", (Difference(0, "tree", 16, 0.1),), Drafting(6, 6, ""))
    coupled = IdentityCheck("coupled", "bfloat16", (Difference(0, "tree", 9, None),), Drafting(6, 6, ""))
    return SelfCheck("target", "draft", "bfloat16", 1.0, (late,), (greedy, coupled))


async def check_that_fails(
    address: str, *, temperature: float, num_samples: int, step: Step, access: Access
) -> SelfCheck:
    return failed()


def test_what_failed_is_said_in_words() -> None:
    assert remarks(failed()) == [
        "sequoia law: only 9 of 200 answers were drafted (draft: not ready yet)",
        "greedy identity: 1 of 6 differ; first after 16 tokens of prompt 1, tree, gap 0.1",
        "coupled identity: 1 of 6 differ at near ties, as expected in bfloat16; first after 9 tokens of prompt 1, tree",
    ]


def test_the_json_object_has_all_figures() -> None:
    found = to_dict(failed())
    law, identity = found["laws"][0], found["identities"][0]
    assert set(found) == {"target", "draft", "dtype", "temperature", "passed", "laws", "identities"}
    judged = {"rule", "drafting", "verdict", "passed"}
    assert set(law) == judged | {"total_variation", "reference", "num_outside"}
    assert set(identity) == judged | {"dtype", "differences"}
    assert set(law["reference"]) == {"expected", "limit"}
    assert set(law["drafting"]) == {"num_answers", "num_drafted", "fallback_reason"}
    assert set(identity["differences"][0]) == {"prompt", "shape", "num_same_tokens", "gap"}


def test_a_failed_check_is_a_table_and_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sequoia.cli.selfcheck.check_system", check_that_fails)
    assert main(["selfcheck"]) == 1
    printed = capsys.readouterr().out
    assert "not checked" in printed
    assert "greedy identity: 1 of 6 differ; first after" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "0"], "error: samples: is 0; it must be at least 1\n"),
        (["--temperature", "0"], "error: temperature: is 0; it must be above 0 (greedy text is checked anyway)\n"),
    ],
)
def test_a_wrong_argument_is_named(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert main(["selfcheck", *flags]) == 2
    assert capsys.readouterr().err == message


class DraftlessCoordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Describes a target that nobody drafts for."""

    async def DescribePair(self, request: pb.DescribePairRequest, context: Context) -> pb.DescribePairResponse:
        return pb.DescribePairResponse(verify=WorkerDescription(model="target"))


async def test_a_system_without_a_draft_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(DraftlessCoordinator()) as address:
        assert await asyncio.to_thread(main, ["selfcheck", "--address", address]) == 1
    assert capsys.readouterr().err == "error: draft: there is no draft worker at present; start one and check again\n"


def test_a_running_system_passes(tiny_system: System, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples of the exact law exceed the limit once in 1000 checks, and by 0.05 never in a test suite's life."""
    arguments = ["selfcheck", "--address", tiny_system.deployment.address, "--samples", "150", "--json"]
    status = main(arguments)
    found = json.loads(capsys.readouterr().out)
    assert status == (0 if found["passed"] else 1)
    assert [each["rule"] for each in found["laws"]] == ["off", "sequoia", "traversal", "coupled", "sample_and_walk"]
    assert all(each["total_variation"] < each["reference"]["limit"] + 0.05 for each in found["laws"])
    assert all(each["num_outside"] == 0 for each in found["laws"])
    assert all(each["drafting"]["num_drafted"] > 75 for each in found["laws"][1:])
    assert {each["rule"]: each["verdict"] for each in found["identities"]} == {"greedy": "same", "coupled": "same"}
