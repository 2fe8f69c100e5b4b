"""A draft without a model: its trees, the target's law whatever they are, and a running system that copies quicker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import System
from rich.console import Console
from test_drafter import Bench
from test_exactness import chi_square_z
from tiny_models import write_tiny_model

from coordinator.workers import check_pair
from draft_worker.lookup import LookupSession
from sequoia.cli.deployment import Deployment, DeploymentSettings
from sequoia.cli.steps import Steps
from sequoia.client import Client, Message
from sequoia.engine.noise import gumbel_noise
from sequoia.engine.sampling import RandomChoices
from sequoia.errors import FailedPrecondition
from sequoia.rules import COUPLED, GREEDY, SAMPLE_AND_WALK, SEQUOIA, TRAVERSAL, Rule
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import DynamicShape, TokenTree, Topology, TreeShape
from sequoia.v1 import worker_pb2
from verify_worker.verifier import VerifyLimits, VerifySession

TREE = Topology((-1, 0, 0, 1, 1, 2, 3))
# Behind 1, 2 came 3 twice and 4 once; behind 3 came 5 and then 6, behind 4 came 7.
TEXT = (1, 2, 3, 5, 0, 1, 2, 4, 7, 8, 1, 2, 3, 6, 9, 1, 2)


def session(rule: Rule, sampling: Sampling, tokens: Sequence[int], seed: int = 0) -> LookupSession:
    found = LookupSession(Decoding(rule, sampling, 1), np.random.default_rng(seed), 200)
    found.commit(0, tuple(tokens))
    return found


def grown(found: LookupSession, shape: TreeShape) -> TokenTree:
    job = found.grow(shape)
    try:
        next(job)
    except StopIteration as end:
        return end.value.tree
    raise AssertionError("there is nothing to forward")


@pytest.mark.parametrize("rule", [GREEDY, SAMPLE_AND_WALK])
def test_children_are_what_came_most_often(rule: Rule) -> None:
    tree = grown(session(rule, Sampling(0.0 if rule.greedy else 1.0), TEXT), TREE)
    assert tree.topology == Topology((-1, 0, 0, 1, 1, 2, 3))
    assert tree.token_ids[:3] == (2, 3, 4)
    assert set(tree.token_ids[3:5]) == {5, 6}
    assert tree.token_ids[5] == 7


@pytest.mark.parametrize(
    ("tokens", "topology"),
    [
        ((1, 2, 3, 4, 5), Topology.root_only()),
        ((1,), Topology.root_only()),
        ((1, 2, 3, 9, 8, 1, 2), Topology((-1, 0, 1, 2))),
    ],
)
def test_tree_is_smaller_where_the_text_has_been_nowhere(tokens: tuple[int, ...], topology: Topology) -> None:
    for rule in (GREEDY, SEQUOIA):
        tree = grown(session(rule, Sampling(0.0 if rule.greedy else 1.0), tokens), TREE)
        assert tree.topology == topology
        assert (tree.q is not None) == (rule is SEQUOIA and topology.size > 1)


def test_an_answer_becomes_part_of_the_text() -> None:
    found = session(GREEDY, Sampling(0.0), range(10))
    assert grown(found, TREE).topology.size == 1
    found.commit(10, (3, 4))
    assert grown(found, Topology.chain(3)).token_ids == (4, 5, 6)


@pytest.mark.parametrize("rule", [GREEDY, SAMPLE_AND_WALK])
@pytest.mark.parametrize(
    ("shape", "topology", "tokens"),
    [
        # Behind the root 3 (2/3) and 4 (1/3); behind 3 what came last and what came first (1/3 each); behind 4 is 7.
        (DynamicShape(6, 3, 5), Topology((-1, 0, 0, 1, 1, 2)), (2, 3, 4, 6, 5, 7)),
        (DynamicShape(6, 3, 1), Topology((-1, 0, 0, 1, 1)), (2, 3, 4, 6, 5)),
        (DynamicShape(12, 2, 5), Topology((-1, 0, 0)), (2, 3, 4)),
    ],
    ids=str,
)
def test_dynamic_trees_have_the_likeliest_paths(
    rule: Rule, shape: DynamicShape, topology: Topology, tokens: tuple[int, ...]
) -> None:
    tree = grown(session(rule, Sampling(0.0 if rule.greedy else 1.0), TEXT), shape)
    assert (tree.topology, tree.token_ids) == (topology, tokens)


def test_a_dynamic_tree_goes_on_where_the_text_is_sure() -> None:
    """Behind 1, 2 came 3 (3/4) or 4 (1/4), and behind 3 always 5."""
    text = (9, 1, 2, 3, 5, 8, 1, 2, 3, 5, 7, 1, 2, 4, 6, 0, 1, 2, 3, 5, 1, 2)
    tree = grown(session(GREEDY, Sampling(0.0), text), DynamicShape(3, 3, 2))
    assert (tree.topology, tree.token_ids) == (Topology.chain(3), (2, 3, 5))


@pytest.mark.parametrize("seed", range(20))
def test_coupled_children_win_the_race_of_the_counts(seed: int) -> None:
    tree = grown(session(COUPLED, Sampling(0.7, seed=seed), TEXT), Topology((-1, 0, 0)))
    noise = gumbel_noise(seed, len(TEXT), torch.tensor([3, 4])).tolist()
    first = 3 if np.log(2 / 3) + noise[0] > np.log(1 / 3) + noise[1] else 4
    assert tree.token_ids == (2, first, 7 - first)
    assert grown(session(COUPLED, Sampling(0.7, seed=seed), TEXT), DynamicShape(2, 2, 1)).token_ids == (2, first)


@pytest.mark.parametrize("rule", [SEQUOIA, TRAVERSAL])
def test_drawn_children_follow_the_q_that_travels(rule: Rule) -> None:
    """The first child of 4000 trees is 3 two times of three: 5 standard errors, false alarm 6e-7."""
    found, firsts = session(rule, Sampling(1.0), TEXT), Counter[int]()
    for _ in range(4000):
        tree = grown(found, Topology((-1, 0, 0, 1)))
        assert tree.q is not None
        q = dict(zip(tree.q.token_ids[0].tolist(), tree.q.weights[0].tolist(), strict=True))
        assert q[3] / (q[3] + q[4]) == pytest.approx(2 / 3, rel=2**-7)
        assert set(tree.token_ids[1:3]) == {3, 4}
        firsts[tree.token_ids[1]] += 1
    assert firsts[3] / 4000 == pytest.approx(2 / 3, abs=5 * (2 / 9 / 4000) ** 0.5 + 2**-8)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder: Path = tmp_path_factory.mktemp("target")
    write_tiny_model(folder, "llama")
    return Bench(folder)


# A target that says nothing but three tokens, and a text of these three: whatever it says has been there before.
THREE = Sampling(5.0, top_k=3, logit_bias=((41, 90.0), (42, 90.0), (43, 90.0)))
PROMPT = (*range(30, 38), 41, 42, 43, 41, 43, 42, 42, 41, 41, 42)


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        *((rule, TREE) for rule in (SEQUOIA, TRAVERSAL, SAMPLE_AND_WALK, COUPLED)),
        *((rule, DynamicShape(7, 4, 3)) for rule in (SAMPLE_AND_WALK, COUPLED)),
    ],
    ids=str,
)
def test_tokens_have_the_targets_joint_law(bench: Bench, rule: Rule, shape: TreeShape) -> None:
    """Chi-square of 400 triples, cells below 5 expected pooled, z above 3.72: false alarm 1e-4 a rule."""
    sampling, prompt, draws = THREE, PROMPT, 400

    def law(tokens: tuple[int, ...]) -> dict[int, float]:
        p = reference.probabilities(bench.logits((*prompt, *tokens)).tolist(), sampling, list(prompt), [])
        return {token: mass for token, mass in enumerate(p) if mass > 0.0}

    pairs = {(a, b): pa * pb for a, pa in law(()).items() for b, pb in law((a,)).items()}
    triples = {(*ab, c): p * pc for ab, p in pairs.items() for c, pc in law(ab).items()}
    num_nodes = num_steps = 0

    def write(seed: int) -> tuple[int, ...]:
        nonlocal num_nodes, num_steps
        own = replace(sampling, seed=seed if rule is COUPLED else None)
        decoding, tokens = Decoding(rule, own, len(prompt)), prompt
        draft = session(rule, own, prompt, seed)
        with bench.engine.cache.slot() as slot:
            choices = RandomChoices(np.random.default_rng())
            verify = VerifySession(slot, prompt, decoding, choices, VerifyLimits(8, 400), 200)
            while len(tokens) < len(prompt) + 3:
                draft.commit(len(prompt), tokens[len(prompt) :])
                tree = grown(draft, shape)
                num_nodes, num_steps = num_nodes + tree.topology.size - 1, num_steps + 1
                tokens += bench.run(verify.verify(tree)).tokens(tree)
        return tokens[len(prompt) :][:3]

    found = Counter(map(write, range(draws)))
    assert num_nodes > draws, "trees that are roots alone prove nothing"
    assert num_steps < 2.75 * draws, "and neither do trees that are never accepted"
    assert set(found) <= set(triples)
    assert chi_square_z(found, triples, draws) < 3.72


def describe(tokenizer_hash: str) -> worker_pb2.WorkerDescription:
    return worker_pb2.WorkerDescription(model="m", tokenizer_hash=tokenizer_hash)


def test_a_draft_without_a_tokenizer_fits_every_target_and_no_other_does() -> None:
    check_pair(describe("a"), describe(""))
    with pytest.raises(FailedPrecondition, match="different tokenizers"):
        check_pair(describe("a"), describe("b"))
    with pytest.raises(FailedPrecondition, match="different tokenizers"):
        check_pair(describe(""), describe("b"))


@pytest.fixture(scope="module", params=["split", "colocated"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    target = tmp_path_factory.mktemp("tiny") / "target"
    write_tiny_model(target, "llama")
    settings = DeploymentSettings(
        str(target), "ngram", dtype="float32", listen="127.0.0.1:0", num_threads=1, placement=request.param
    )
    with (
        Deployment(settings, Steps(Console(quiet=True))) as deployment,
        Client(deployment.address, timeout_seconds=60) as client,
    ):
        yield System(deployment, target, client)


WAYS = ("tree", "auto", Topology.chain(4), Topology((-1, 0, 0, 0, 1, 1, 2, 4, 5, 7)), DynamicShape(10, 5, 4))
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.4, "top_k": 2, "seed": 7},
    {"temperature": 1.0, "top_p": 0.9, "seed": 2**63},
)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_text_is_the_one_of_plain_decoding(tiny: System, setting: dict[str, Any]) -> None:
    for prompt in (list(range(40, 60)), [5, 6, 7] * 8):
        texts = {
            tiny.client.generate(prompt, max_tokens=128, ignore_eos=True, speculation=way, **setting).token_ids
            for way in ("off", *WAYS)
        }
        assert len(texts) == 1


def test_a_root_alone_is_a_plain_step_and_no_fallback(tiny: System) -> None:
    """Greedy text of this model does not repeat itself at first: hardly a step has a tree."""
    found = tiny.client.generate(
        list(range(40, 70)), max_tokens=32, temperature=0, ignore_eos=True, speculation=WAYS[2]
    )
    figures = found.speculation
    assert figures.num_steps > figures.num_drafted_steps
    assert figures.fallback_reason in ("", "draft: not ready yet")
    assert figures.num_fallback_steps <= 2
    # Children that were asked for and did not come count as rejected.
    assert figures.offered[0][0] == figures.num_steps - figures.num_fallback_steps - 1
    assert sum(each.num_steps for each in figures.trees) == figures.num_steps - figures.num_fallback_steps


def test_the_worker_fits_any_vocabulary_and_has_a_curve(tiny: System) -> None:
    draft = tiny.client.describe_pair().draft
    assert (draft.model, draft.tokenizer_hash) == ("ngram", "")
    assert draft.context_length >= tiny.client.describe_pair().verify.context_length
    assert 0.0 < max(draft.latencies[0].seconds) < 0.01
    assert draft.latencies[0].num_tokens[-1] == draft.max_tree_size


CODE = """def total(prices, rate):
    subtotal = 0.0
    for price in prices:
        subtotal += price
    return subtotal * (1.0 + rate)
"""


@pytest.mark.timeout(420)  # the first run fetches and unpacks the model
def test_copying_takes_fewer_steps_and_changes_nothing_on_the_real_model() -> None:
    prompt = [Message("user", f"Repeat this code exactly, without any explanation:\n\n```python\n{CODE}```")]
    settings = DeploymentSettings("smollm2-135m", "ngram", dtype="float32", listen="127.0.0.1:0", context_length=1024)
    with (
        Deployment(settings, Steps(Console(quiet=True))) as deployment,
        Client(deployment.address, timeout_seconds=120) as client,
    ):
        plain = client.generate(prompt, max_tokens=64, temperature=0, speculation="off")
        found = client.generate(prompt, max_tokens=64, temperature=0, speculation="tree")
    assert found.token_ids == plain.token_ids
    assert found.speculation.mean_tokens_per_step > 1.3
    assert found.speculation.num_accepted_ngram_tokens == found.speculation.num_accepted_tokens
    assert found.speculation.num_ngram_tokens == found.speculation.num_drafted_tokens
