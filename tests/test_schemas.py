"""What schemas are taken, and what reading one may cost."""

from __future__ import annotations

import builtins
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from test_grammar import BACKEND, described

from sequoia.engine.grammar import MAX_DEPTH, Grammars
from sequoia.errors import InvalidArgument
from sequoia.sampling import MAX_SCHEMA_BYTES, ParameterError, Sampling


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(described(BACKEND, 400, 1))


def ids(text: str) -> tuple[int, ...]:
    return tuple(BACKEND.encode(text, add_special_tokens=False).ids)


def test_schemas_are_read_once_and_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sequoia.engine.grammar._NUM_KEPT", 3)
    schemas = [f'{{"enum": [{number}]}}' for number in range(4)]
    grammars = Grammars(described(BACKEND, 400, 1))
    for number in (0, 1, 2, 0, 3):
        grammars.constraint(schemas[number])
    assert [grammars.has_read(each) for each in schemas] == [True, False, True, True]


def test_a_schema_that_takes_too_long_is_given_up_and_not_tried_again(grammars: Grammars) -> None:
    patterns = [{"type": "string", "pattern": f".*{a}{b}.*"} for a in "abcdefghij" for b in "abcdefghij"]
    schema = json.dumps({"allOf": patterns})
    for most_seconds in (30, 0.1):
        started = time.monotonic()
        with pytest.raises(InvalidArgument, match=r"takes more than 3 s to read"):
            grammars.constraint(schema)
        assert time.monotonic() - started < most_seconds


def nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


REFUSED: dict[str, tuple[Callable[[], str], str]] = {
    "no JSON": (lambda: "{", "is no JSON"),
    "no object": (lambda: "true", "is no JSON object"),
    "no JSON but for Python": (lambda: '{"const": NaN}', "is no JSON schema"),
    "no type": (lambda: '{"type": "text"}', "Invalid type"),
    "not served": (lambda: '{"not": {"type": "string"}}', r'Unimplemented keys: \["not"\]'),
    "lenient by itself": (lambda: '{"not": {}, "x-guidance": {"lenient": true}}', "Unimplemented keys"),
    "either of two": (lambda: '{"oneOf": [{"type": "string"}, {"maxLength": 2}]}', "oneOf"),
    "nothing at all": (lambda: '{"$ref": "#"}', "cannot be held to it"),
    "a foreign reference": (lambda: '{"$ref": "http://127.0.0.1:9/schema"}', "does not fetch resources"),
    "a file": (lambda: '{"$ref": "file:///etc/passwd"}', "does not fetch resources"),
    "no expression": (lambda: '{"type": "string", "pattern": "("}', "unclosed group"),
    "too deep": (lambda: nested(MAX_DEPTH), "nested deeper than 64 levels"),
    "far too deep": (lambda: nested(6000), "nested deeper|recursion"),
    "too much": (lambda: json.dumps({"allOf": [{"anyOf": [{"maxLength": n} for n in range(40)]}] * 40}), "too large"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_schema_that_cannot_be_served_is_refused_with_the_reason(grammars: Grammars, kind: str) -> None:
    make, reason = REFUSED[kind]
    with pytest.raises(InvalidArgument, match=reason) as refused:
        grammars.constraint(make())
    assert refused.value.field == "sampling.json_schema"


def test_a_schema_is_measured_before_it_is_read() -> None:
    with pytest.raises(ParameterError, match="has 65538 bytes; at most 65536"):
        Sampling(json_schema="é" * (MAX_SCHEMA_BYTES // 2 + 1))


def test_states_without_end_are_an_error_and_never_an_answer(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sequoia.engine.grammar._MAX_LEXER_STATES", 300)
    constraint = grammars.constraint('{"type": "string", "pattern": "^(.*a.{200}|.*b.{150}c)$"}')
    answers = [ids('"' + "ab" * length) for length in range(400)]
    with pytest.raises(InvalidArgument, match="too many states"):
        list(map(constraint.allowed, answers))


def test_a_worker_without_the_library_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InvalidArgument, match=r"pip install sequoia-serving\[grammar\]") as refused:
        Grammars(described(BACKEND, 400, 1)).constraint("{}")
    assert refused.value.field == "sampling.json_schema"


def test_a_model_that_never_ends_cannot_be_held_to_anything() -> None:
    with pytest.raises(InvalidArgument, match="no token that ends an answer"):
        Grammars(described(BACKEND, 400)).constraint("{}")
