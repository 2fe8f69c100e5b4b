"""Answers held to a JSON schema: what may follow at each node, and the law of every rule under it, by enumeration."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import reference
import torch
from enumeration import Context, Enumerator, drawn_tree, outcomes, top_tree
from jsonschema import validate
from test_parameters import logits as free_logits
from test_parameters import q as free_q
from tiny_models import build_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from sequoia.engine.grammar import Grammars, JsonConstraint
from sequoia.engine.sampling import Path, RandomChoices, adjusted_logits
from sequoia.engine.target_table import TargetTable
from sequoia.engine.tokenizer import TokenizerDescription
from sequoia.engine.verification import verify_tree
from sequoia.errors import InvalidArgument
from sequoia.rules import COUPLED, GREEDY, SAMPLE_AND_WALK, SEQUOIA, TRAVERSAL, Rule
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import TokenTree, Topology

# A vocabulary as small as the laws', of which every text that a schema admits can be written down.
TOKENS = ("1", "0", "10", "</s>")
END = 3
TEXTS = ("1", "10", "101")
ENUM = '{"enum": [1, 10, 101]}'
TREE = Topology((-1, 0, 0, 1))
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "likes": {"type": "array", "items": {"enum": ["sky", "sea"]}, "maxItems": 2},
        "parent": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def described(tokenizer: Tokenizer, size: int, *ends: int) -> TokenizerDescription:
    return TokenizerDescription(tokenizer.to_str().encode(), "", ends, {}, size, "")


@pytest.fixture(scope="module")
def small() -> Grammars:
    model = models.BPE({token: index for index, token in enumerate(TOKENS)}, [("1", "0")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([TOKENS[END]])
    return Grammars(described(tokenizer, len(TOKENS), END))


BACKEND = build_tokenizer(400).backend_tokenizer


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(described(BACKEND, 400, 0, 1))


def may_follow(answer: Sequence[int]) -> list[bool]:
    """By definition, for ENUM: what leaves a text that can still become one of TEXTS, and the end where it is one."""
    text = "".join(TOKENS[token] for token in answer)
    if END in answer or not any(each.startswith(text) for each in TEXTS):
        return [True] * len(TOKENS)
    return [any(each.startswith(text + token) for each in TEXTS) for token in TOKENS[:END]] + [text in TEXTS]


def ids(text: str) -> tuple[int, ...]:
    return tuple(BACKEND.encode(text, add_special_tokens=False).ids)


def told(constraint: JsonConstraint, answer: Context) -> list[bool]:
    allowed = constraint.allowed(answer)
    return [True] * len(TOKENS) if allowed is None else allowed[: len(TOKENS)].tolist()


def test_after_every_path_what_may_follow_is_what_the_definition_says(small: Grammars) -> None:
    constraint = small.constraint(ENUM)
    paths = [path for length in range(5) for path in product(range(len(TOKENS)), repeat=length)]
    for path in np.random.default_rng(0).permutation(len(paths)):
        assert told(constraint, paths[path]) == may_follow(paths[path])


def test_what_may_follow_depends_on_the_path_alone_whatever_was_asked_before(grammars: Grammars) -> None:
    """Walks that branch, end and leave what is allowed, in one constraint, against one that is new for every path."""
    generator = np.random.default_rng(1)
    constraint, schema = grammars.constraint(json.dumps(PERSON)), json.dumps(PERSON)
    walk: Context = ()
    for _ in range(300):
        walk = walk[: generator.integers(len(walk) + 1)] if generator.random() < 0.3 else walk
        found, expected = constraint.allowed(walk), grammars.constraint(schema).allowed(walk)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            np.testing.assert_array_equal(found, expected)
            token = int(generator.choice(400 if generator.random() < 0.05 else np.flatnonzero(found)))
            walk = (*walk, token)


def falling_back() -> Tokenizer:
    """As SentencePiece's: blanks are U+2581, and what has no token of its own is written in bytes."""
    words = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *'{}[]":,0123456789trueflasn\u2581']
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(words[:2])
    return tokenizer


def test_characters_that_are_written_in_bytes_are_whole_in_what_is_allowed() -> None:
    tokenizer, generator = falling_back(), np.random.default_rng(3)
    size, schema = tokenizer.get_vocab_size(), {"type": "array", "items": {"type": "string", "maxLength": 3}}
    grammars = Grammars(described(tokenizer, size, 1))
    written = json.dumps(["\u00e9 \u2581", "\U0001f333"], ensure_ascii=False, separators=(",", ":"))
    known = tuple(tokenizer.encode(written, add_special_tokens=False).ids)
    assert any(2 <= token < 258 for token in known)
    for length in range(len(known)):
        allowed = grammars.constraint(json.dumps(schema)).allowed(known[:length])
        assert allowed is not None
        assert allowed[known[length]], f"{written!r} behind {length} tokens"
    for _ in range(20):
        constraint, answer = grammars.constraint(json.dumps({**schema, "minItems": 2, "maxItems": 4})), ()
        while 1 not in answer:
            allowed = constraint.allowed(answer)
            assert allowed is not None
            choices = np.flatnonzero(allowed[:size])
            in_bytes = choices[(choices >= 130) & (choices < 258)]
            answer = (
                *answer,
                int(generator.choice(in_bytes if len(in_bytes) and generator.random() < 0.5 else choices)),
            )
        validate(json.loads(tokenizer.decode(answer)), schema)


def test_what_is_written_from_allowed_tokens_is_what_the_schema_admits(grammars: Grammars) -> None:
    generator, schema = np.random.default_rng(2), {**PERSON, "properties": {**PERSON["properties"], "parent": False}}
    for _ in range(10):
        constraint = grammars.constraint(json.dumps(schema))
        answer: Context = ()
        while not {0, 1} & set(answer):
            allowed = constraint.allowed(answer)
            assert allowed is not None
            answer = (*answer, int(generator.choice(np.flatnonzero(allowed))))
        validate(json.loads(BACKEND.decode(answer, skip_special_tokens=True)), schema)


def test_blanks_between_two_values_come_to_an_end(grammars: Grammars) -> None:
    constraint, [blank] = grammars.constraint('{"type": "object"}'), ids(" ")
    allowed = [constraint.allowed((*ids("{"), *[blank] * count)) for count in (31, 32)]
    assert [each is not None and bool(each[blank]) for each in allowed] == [True, False]


def held(sampling: Sampling, small: Grammars, rule: Rule, num_prompt_tokens: int) -> Decoding:
    return Decoding(rule, replace(sampling, json_schema=ENUM), num_prompt_tokens, small.constraint(ENUM))


PROMPT = (1, 2, 2, 0)
ALL = Sampling(0.8, 0.9, 3, 0.05, 1.3, 0.4, 0.3, ((2, 0.7),))
SETTINGS = {"alone": Sampling(), "temperature": Sampling(0.4), "all": ALL}


@cache
def logits(context: Context) -> tuple[float, ...]:
    return tuple(x if y else -math.inf for x, y in zip(free_logits(context), may_follow(context), strict=True))


def step(decoding: Decoding, source: Enumerator) -> Context:
    """Its logits know nothing of the schema, and neither does the draft."""

    class Rows:
        def __getitem__(self, node: int) -> torch.Tensor:
            return torch.tensor(free_logits(tree.path_tokens(node)), dtype=torch.float64)

    tree = drawn_tree(TREE, free_q, source) if decoding.rule.needs_q else top_tree(TREE, free_q)
    return verify_tree(tree, Rows(), decoding, PROMPT, source).tokens(tree)  # type: ignore[arg-type]


def next_p(sampling: Sampling, context: Context) -> list[float]:
    return reference.probabilities(logits(context), sampling, PROMPT, context)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("rule", [SEQUOIA, TRAVERSAL, SAMPLE_AND_WALK], ids=lambda rule: rule.name)
def test_output_has_exactly_the_law_of_the_masked_target(small: Grammars, rule: Rule, setting: str) -> None:
    sampling, found = SETTINGS[setting], defaultdict[Context, float](float)
    decoding = held(sampling, small, rule, len(PROMPT))
    for probability, tokens in outcomes(lambda source: step(decoding, source)):
        for rest in product(range(len(TOKENS)), repeat=3 - len(tokens)):
            block = (*tokens, *rest)
            tail = math.prod(next_p(sampling, block[:i])[block[i]] for i in range(len(tokens), 3))
            found[block] += probability * tail
    for block in product(range(len(TOKENS)), repeat=3):
        expected = math.prod(next_p(sampling, block[:i])[block[i]] for i in range(3))
        assert found[block] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
def test_seeded_output_is_the_argmax_of_the_masked_log_p_plus_noise(small: Grammars, setting: str) -> None:
    for seed in range(100):
        sampling = replace(SETTINGS[setting], seed=seed)
        found = step(held(sampling, small, COUPLED, len(PROMPT)), Enumerator([]))
        expected: Context = ()
        while len(expected) < len(found):
            winner, _ = reference.coupled(next_p(sampling, expected), seed, len(PROMPT) + len(expected))
            expected = (*expected, winner)
        assert found == expected


def test_greedy_output_is_the_argmax_of_what_is_allowed(small: Grammars) -> None:
    found = step(held(Sampling(0.0), small, GREEDY, len(PROMPT)), Enumerator([]))
    for index, token in enumerate(found):
        row = logits(found[:index])
        assert token == row.index(max(row))


@pytest.mark.parametrize("seed", range(10))
def test_a_table_of_all_nodes_reads_what_single_rows_do(small: Grammars, seed: int) -> None:
    tree = TokenTree(Topology((-1, 0, 0, 1, 2, 3)), (0, 0, 2, 1, 0, 0))
    rows = torch.stack([torch.tensor(free_logits(tree.path_tokens(node))) for node in range(6)])
    decoding = held(replace(ALL, seed=seed, num_logprobs=2), small, COUPLED, len(PROMPT))
    ours, theirs = (
        verify_tree(tree, rows, decoding, PROMPT, RandomChoices(np.random.default_rng(0)), *table)
        for table in ((), (TargetTable,))
    )
    assert (ours.accepted_nodes, ours.bonus_token_id) == (theirs.accepted_nodes, theirs.bonus_token_id)


def test_a_node_behind_a_token_that_is_not_allowed_is_left_as_it_is(small: Grammars) -> None:
    row, sampling = torch.tensor([1.0, 2.0, 3.0, 4.0]), Sampling(json_schema=ENUM)
    for drafted in ((1,), (0, END, 0)):
        assert adjusted_logits(row, sampling, Path((9,), 1, drafted), small.constraint(ENUM)).tolist() == row.tolist()


def test_a_session_that_is_rebuilt_goes_on_where_the_answer_was(small: Grammars) -> None:
    assert told(small.constraint(ENUM, (0, 1)), (0, 1)) == [True, False, False, True]
    with pytest.raises(InvalidArgument, match="the 2 tokens of the answer do not follow it"):
        small.constraint(ENUM, (1, 1))
