"""Every sampling parameter under every rule: the law of a step against a definition in plain Python, by enumeration."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from enumeration import Context, Enumerator, drawn_tree, outcomes, top_tree
from torch import Tensor

from coordinator.request import parse_request
from coordinator.text import TextCodec
from sequoia.engine.sampling import Path as TokenPath
from sequoia.engine.sampling import RandomChoices, adjusted_logits, log_weights
from sequoia.engine.verification import verify_tree
from sequoia.errors import Internal, InvalidArgument
from sequoia.rules import COUPLED, GREEDY, RULES, SAMPLE_AND_WALK, SEQUOIA, TRAVERSAL, Rule, choose_rule, matrix
from sequoia.sampling import PARAMETERS, REQUEST_PARAMETERS, Decoding, ParameterError, Sampling
from sequoia.topology import TokenTree, Topology
from sequoia.v1 import coordinator_pb2
from sequoia.v1.sampling_pb2 import Sampling as WireSampling
from sequoia.v1.worker_pb2 import TokenizerFiles, WorkerDescription
from sequoia.wire import rule_to_wire

VOCABULARY = 4
PROMPT, ANSWER = (1, 2, 2), (3, 0)  # the last token of the answer is the root
COMMITTED = PROMPT + ANSWER
TREE = Topology((-1, 0, 0, 1))
# Every parameter alone, and all of them at once. The seed is set where a rule takes one.
SETTINGS: dict[str, Sampling] = {
    "temperature": Sampling(temperature=0.6),
    "top_p": Sampling(top_p=0.7),
    "top_k": Sampling(top_k=2),
    "min_p": Sampling(min_p=0.3),
    "repetition_penalty": Sampling(repetition_penalty=1.7),
    "presence_penalty": Sampling(presence_penalty=0.9),
    "frequency_penalty": Sampling(frequency_penalty=-0.8),
    "logit_bias": Sampling(logit_bias=((0, 1.5), (3, -100.0))),
    "min_tokens": Sampling(min_tokens=4, stop_token_ids=(1, 2)),
    "all": Sampling(0.8, 0.9, 3, 0.05, 1.3, 0.4, 0.3, ((2, 0.7),), 3, (1,)),
}


@cache
def logits(context: Context) -> tuple[float, ...]:
    """The target's, of both signs, other ones after every context."""
    generator = np.random.default_rng([23, *context])
    return tuple(generator.normal(0.0, 1.5, VOCABULARY).tolist())


def q(context: Context) -> tuple[Fraction, ...]:
    weights = np.random.default_rng([29, *context]).integers(1, 9, VOCABULARY).tolist()
    return tuple(Fraction(weight, sum(weights)) for weight in weights)


class Rows:
    """The target's logits of a tree's nodes, made when asked for, because a node's context is drawn late."""

    def __init__(self, tree: TokenTree) -> None:
        self._tree = tree

    def __getitem__(self, node: int) -> Tensor:
        return torch.tensor(logits(self._tree.path_tokens(node)), dtype=torch.float64)


def step(rule: Rule, sampling: Sampling, source: Enumerator) -> Context:
    tree = drawn_tree(TREE, q, source) if rule.needs_q else top_tree(TREE, q)
    decoding = Decoding(rule, sampling, len(PROMPT))
    return verify_tree(tree, Rows(tree), decoding, COMMITTED, source).tokens(tree)  # type: ignore[arg-type]


def next_p(sampling: Sampling, context: Context) -> list[float]:
    return reference.probabilities(logits(context), sampling, PROMPT, (*ANSWER, *context))


@pytest.mark.parametrize("parameter", SETTINGS)
@pytest.mark.parametrize("rule", [SEQUOIA, TRAVERSAL, SAMPLE_AND_WALK], ids=lambda rule: rule.name)
def test_output_has_exactly_the_law_that_the_parameter_defines(rule: Rule, parameter: str) -> None:
    sampling = SETTINGS[parameter]
    found: dict[Context, float] = defaultdict(float)
    for probability, tokens in outcomes(lambda source: step(rule, sampling, source)):
        for rest in product(range(VOCABULARY), repeat=3 - len(tokens)):
            block = (*tokens, *rest)
            tail = math.prod(next_p(sampling, block[:i])[block[i]] for i in range(len(tokens), 3))
            found[block] += probability * tail
    for block in product(range(VOCABULARY), repeat=3):
        expected = math.prod(next_p(sampling, block[:i])[block[i]] for i in range(3))
        assert found[block] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("parameter", [*SETTINGS, "seed"])
def test_coupled_output_is_the_argmax_of_log_p_plus_noise(parameter: str) -> None:
    """Against plain sampling by definition, 200 seeds: the law of the race itself is tested in test_noise.py."""
    for seed in range(200):
        sampling = with_seed(SETTINGS.get(parameter, Sampling()), seed)
        found = step(COUPLED, sampling, Enumerator([]))
        expected: Context = ()
        while len(expected) < len(found):
            p = next_p(sampling, expected)
            expected = (*expected, reference.coupled(p, seed, len(COMMITTED) + len(expected))[0])
        assert found == expected


def with_seed(sampling: Sampling, seed: int) -> Sampling:
    return Sampling(**{name: getattr(sampling, name) for name in PARAMETERS if name != "seed"}, seed=seed)


@pytest.mark.parametrize("parameter", SETTINGS)
def test_greedy_output_is_the_argmax_of_what_acts_before_the_temperature(parameter: str) -> None:
    values = {name: getattr(SETTINGS[parameter], name) for name in PARAMETERS if name != "temperature"}
    sampling = Sampling(temperature=0.0, **values)
    found = step(GREEDY, sampling, Enumerator([]))
    for index, token in enumerate(found):
        row = reference.adjusted(logits(found[:index]), sampling, PROMPT, (*ANSWER, *found[:index]))
        assert token == row.index(max(row))


def test_greedy_takes_the_smaller_id_of_a_tie() -> None:
    rows, tree = torch.tensor([[0.0, 3.0, 1.0, 3.0]]), TokenTree.root_only(0)
    decoding = Decoding(GREEDY, Sampling(temperature=0.0), 1)
    assert verify_tree(tree, rows, decoding, (0,), RandomChoices(np.random.default_rng(0))).bonus_token_id == 1


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_logprobs_inside_an_accepted_run_are_those_of_each_tokens_own_place(rule: Rule) -> None:
    all_of_them = SETTINGS["all"]
    values = {name: getattr(all_of_them, name) for name in PARAMETERS if name not in ("num_logprobs", "seed")}
    values["temperature"] = 0.0 if rule is GREEDY else 0.8
    sampling = Sampling(**values, num_logprobs=2, seed=5 if rule is COUPLED else None)
    longest = 0
    for seed in range(30):
        generator = np.random.default_rng(seed)
        tree = random_tree(generator)
        decoding, rows = Decoding(rule, sampling, len(PROMPT)), torch.stack([Rows(tree)[node] for node in range(4)])
        verdict = verify_tree(tree, rows, decoding, COMMITTED, RandomChoices(generator))
        tokens = verdict.tokens(tree)
        longest = max(longest, len(tokens))
        assert [each.token_id for each in verdict.logprobs] == list(tokens)
        for index, each in enumerate(verdict.logprobs):
            row = logits(tokens[:index])
            raw = np.log(reference.probabilities(row, Sampling()))
            assert each.raw == pytest.approx(raw[each.token_id], abs=1e-12)
            assert each.processed == pytest.approx(processed(sampling, tokens[:index])[each.token_id], abs=1e-12)
            best = sorted(range(VOCABULARY), key=lambda token: -raw[token])[:2]
            assert [token for token, _, _ in each.top] == best
            assert [p for _, p, _ in each.top] == pytest.approx([raw[token] for token in best], abs=1e-12)
    assert longest > 1


def random_tree(generator: np.random.Generator) -> TokenTree:
    class Source:
        def choose(self, probabilities: Sequence[float]) -> int:
            return int(generator.choice(len(probabilities), p=probabilities))

    tree = drawn_tree(TREE, q, Source())  # type: ignore[arg-type]
    return TokenTree(TREE, tuple(tree.token_ids[node] for node in range(TREE.size)), tree.q)


def processed(sampling: Sampling, context: Context) -> list[float]:
    if sampling.greedy:
        row = reference.adjusted(logits(context), sampling, PROMPT, (*ANSWER, *context))
        p = reference.probabilities(row, Sampling())
    else:
        p = next_p(sampling, context)
    with np.errstate(divide="ignore"):
        return np.log(p).tolist()


def row_of(values: Sequence[float], **parameters: object) -> Tensor:
    sampling = Sampling(**parameters)  # type: ignore[arg-type]
    return log_weights(adjusted_logits(torch.tensor(values), sampling, TokenPath((0,), 1)), sampling).softmax(0)


def test_the_coolest_temperature_there_is_gives_the_argmax_and_no_nan() -> None:
    assert row_of([1.0, 1.0 + 1e-6, -3.0], temperature=5e-324).tolist() == [0.0, 1.0, 0.0]


def test_exact_zeros_and_infinitely_unlikely_tokens_stay_impossible() -> None:
    assert row_of([0.0, -math.inf, -2000.0]).tolist() == [1.0, 0.0, 0.0]


def test_a_tail_far_below_one_in_ten_million_keeps_its_probability() -> None:
    assert row_of([0.0, -30.0])[1].item() == pytest.approx(math.exp(-30.0), rel=1e-12)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_broken_logits_are_an_error_under_every_rule(rule: Rule, broken: float) -> None:
    sampling = Sampling(temperature=0.0) if rule is GREEDY else Sampling(seed=1 if rule is COUPLED else None)
    rows = torch.tensor([[0.0, broken, 1.0]])
    with pytest.raises(Internal, match="largest logit"):
        verify_tree(
            TokenTree.root_only(0), rows, Decoding(rule, sampling, 1), (0,), RandomChoices(np.random.default_rng(0))
        )


def test_ids_beyond_the_vocabulary_of_the_logits_are_passed_over() -> None:
    sampling = Sampling(logit_bias=((9, 5.0),), repetition_penalty=2.0, presence_penalty=1.0)
    row = adjusted_logits(torch.tensor([1.0, 1.0]), sampling, TokenPath((7, 1), 1, (8,)))
    assert row.tolist() == [1.0, -0.5]


# The matrix: generated from what the code refuses, checked against what the coordinator does.

CODEC = TextCodec.from_files(
    TokenizerFiles(
        tokenizer_json=b'{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0,"b":1},"unk_token":"a"}}',
        eos_token_ids=[1],
    )
)
TARGET = WorkerDescription(vocab_size=8, context_length=64)
GIVEN: dict[str, object] = {
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 2,
    "min_p": 0.5,
    "repetition_penalty": 2.0,
    "presence_penalty": 1.0,
    "frequency_penalty": 1.0,
    "logit_bias": {1: 2.0},
    "min_tokens": 2,
    "stop_token_ids": [3],
    "num_logprobs": 3,
    "seed": 4,
    "json_schema": "{}",
}


def parsed(rule: Rule, **sampling: object) -> Sampling:
    message = coordinator_pb2.GenerateRequest(
        token_ids=coordinator_pb2.TokenIds(ids=[0]),
        sampling=WireSampling(**{"temperature": 0.0 if rule is GREEDY else 0.7, **sampling}),  # type: ignore[arg-type]
        speculation=coordinator_pb2.Speculation(rule=rule_to_wire(rule)),
    )
    return parse_request(message, CODEC, TARGET, 64, SEQUOIA).decoding.sampling


def test_every_parameter_has_a_value_to_be_tried() -> None:
    assert set(GIVEN) == set(PARAMETERS)


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_a_parameter_is_honoured_or_refused_by_name_as_the_matrix_says(rule: Rule, parameter: str) -> None:
    value = 0.0 if (rule, parameter) == (GREEDY, "temperature") else GIVEN[parameter]
    if parameter in rule.refuses:
        with pytest.raises(InvalidArgument) as caught:
            parsed(rule, **{parameter: value})
        assert caught.value.field == f"sampling.{parameter}"
    else:
        assert parsed(rule, **{parameter: value}) != parsed(rule) or parameter == "temperature"


def test_the_matrix_in_the_docs_is_the_generated_one() -> None:
    page = (Path(__file__).parent.parent / "docs/exactness.md").read_text()
    assert matrix(REQUEST_PARAMETERS) in page, f"put this into docs/exactness.md:\n{matrix(REQUEST_PARAMETERS)}"


def test_a_request_is_served_by_the_rule_it_names_or_by_the_one_that_fits() -> None:
    def chosen(name: str = "", *, greedy: bool = False, seeded: bool = False) -> Rule:
        return choose_rule(name, greedy=greedy, seeded=seeded, default=TRAVERSAL)

    assert chosen() is TRAVERSAL
    assert chosen("sequoia") is SEQUOIA
    assert chosen(seeded=True) is COUPLED
    assert chosen("coupled") is COUPLED
    assert chosen(greedy=True) is GREEDY
    assert chosen(greedy=True, seeded=True) is GREEDY


@pytest.mark.parametrize(
    ("name", "greedy", "seeded", "field"),
    [
        ("sequoia", False, True, "seed"),
        ("sample_and_walk", False, True, "seed"),
        ("coupled", True, False, "rule"),
        ("greedy", False, False, "rule"),
        ("specinfer", False, False, "rule"),
        ("no such rule", False, False, "rule"),
    ],
)
def test_a_rule_that_does_not_go_with_the_request_is_refused(name: str, greedy: bool, seeded: bool, field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        choose_rule(name, greedy=greedy, seeded=seeded, default=TRAVERSAL)
    assert caught.value.field == field


def test_a_server_drawn_seed_is_in_effect_and_another_each_time() -> None:
    seeds = {parsed(COUPLED).seed for _ in range(5)}
    assert None not in seeds
    assert len(seeds) == 5


def test_the_tokens_that_end_the_answer_are_the_models_and_the_requests() -> None:
    assert parsed(SEQUOIA, stop_token_ids=[3]).stop_token_ids == (1, 3)
    assert parsed(SEQUOIA, stop_token_ids=[3], ignore_eos=True).stop_token_ids == (3,)


def test_stop_tokens_that_do_not_fit_beside_the_models_own_are_refused_by_name() -> None:
    target = WorkerDescription(vocab_size=100, context_length=64)
    ids = range(2, 66)  # 64, and the end-of-sequence token is 1
    message = coordinator_pb2.GenerateRequest(
        token_ids=coordinator_pb2.TokenIds(ids=[0]), sampling=WireSampling(stop_token_ids=ids)
    )
    with pytest.raises(InvalidArgument) as caught:
        parse_request(message, CODEC, target, 64, SEQUOIA)
    assert caught.value.field == "sampling.stop_token_ids"
