"""Answers that are held to a JSON schema: which tokens may follow which, by llguidance."""

from __future__ import annotations

import json
import subprocess
import sys
from bisect import bisect_left
from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sequoia.engine import schema_trial
from sequoia.engine.tokenizer import TokenizerDescription
from sequoia.errors import InvalidArgument, ResourceExhausted
from sequoia.nesting import is_deeper

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

FIELD = "sampling.json_schema"
MAX_DEPTH = 64  # of a schema; what reads it is recursive
_NUM_KEPT = 16
_MAX_LEXER_STATES = 50_000  # of 1 to 2 kB; the library's own limits are on what a step of its parser may cost
# Of a trial that gets little of a processor.
_TRIAL_TIMEOUT_SECONDS = 20
# JSON may have any number of blanks between two tokens, and a small model may never end writing them.
_BLANKS = r"[\x20\x0A\x0D\x09]{1,32}"


class JsonConstraint:
    """A `sampling.Constraint` for one session: JSON that a schema admits, and then the end of the sequence.

    A function of the tokens, whatever was asked before. Not for two threads at a time.
    """

    def __init__(self, matcher: LLMatcher, eos_token_ids: tuple[int, ...]) -> None:
        self._matcher, self._eos_token_ids = matcher, frozenset(eos_token_ids)
        self._read: tuple[int, ...] = ()  # by the matcher: never the end of a sequence, which it does not count

    def allowed(self, generated: tuple[int, ...]) -> NDArray[np.bool_] | None:
        """As the protocol has it. Raises InvalidArgument where that takes more states than are allowed."""
        both = min(len(self._read), len(generated))
        shared = bisect_left(range(both), True, key=lambda last: self._read[: last + 1] != generated[: last + 1])
        rest = generated[shared:]
        if not self._eos_token_ids.isdisjoint(rest):
            return None
        self._matcher.rollback(len(self._read) - shared)
        num_read = self._matcher.try_consume_tokens(list(rest))
        self._read = generated[: shared + num_read]
        bits = self._matcher.compute_bitmask() if num_read == len(rest) else None
        if self._matcher.is_error():
            raise _refused(self._matcher)
        if bits is None:
            return None
        return np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").astype(np.bool_)


class Grammars:
    """Reads schemas for the answers of one tokenizer; keeps those that were used last. For any thread."""

    def __init__(self, described: TokenizerDescription) -> None:
        self._described, self._lock = described, Lock()
        self._tokenizer: LLTokenizer | None = None
        # What is refused is kept as well: to find that out may have taken longest.
        self._kept: OrderedDict[str, LLMatcher | InvalidArgument] = OrderedDict()

    def has_read(self, schema: str) -> bool:
        """Whether `constraint` is quick."""
        with self._lock:
            return schema in self._kept

    def constraint(self, schema: str, generated: tuple[int, ...] = ()) -> JsonConstraint:
        """For an answer that has these tokens already.

        Raises InvalidArgument naming the schema when it is none, when it is too large or not known in full, when it
        admits nothing, when the tokens are not its own, or when the library is missing; ResourceExhausted when the
        processors are too busy to find out.
        """
        with self._lock:
            found = self._kept.get(schema)
        found = found or self._read(schema)
        with self._lock:
            self._kept[schema] = found
            self._kept.move_to_end(schema)
            if len(self._kept) > _NUM_KEPT:
                self._kept.popitem(last=False)
            if isinstance(found, InvalidArgument):
                raise InvalidArgument(found.message, FIELD)
            constraint = JsonConstraint(found.deep_copy(), self._described.eos_token_ids)
        if constraint.allowed(generated) is None:
            raise InvalidArgument(f"the {len(generated)} tokens of the answer do not follow it", FIELD)
        return constraint

    def _read(self, schema: str) -> LLMatcher | InvalidArgument:
        tokenizer = self._llguidance_tokenizer()
        try:
            return _compiled(schema, tokenizer)
        except InvalidArgument as error:
            return error

    def _llguidance_tokenizer(self) -> LLTokenizer:
        if self._tokenizer is not None:
            return self._tokenizer
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            remedy = "leave it out, or, where the target is: pip install sequoia-serving[grammar]"
            raise InvalidArgument(f"the verify worker has no llguidance; {remedy}", FIELD) from error
        described = self._described
        if not described.eos_token_ids:
            raise InvalidArgument("the model has no token that ends an answer; leave it out", FIELD)
        text, ends = described.tokenizer_json.decode(), list(described.eos_token_ids)
        try:
            self._tokenizer = LLTokenizer(text, n_vocab=described.vocab_size, eos_token=ends)
        except ValueError as error:
            raise InvalidArgument(f"llguidance does not read this model's tokenizer: {error}", FIELD) from error
        return self._tokenizer


def _compiled(schema: str, tokenizer: LLTokenizer) -> LLMatcher:
    """What has read nothing yet. Raises InvalidArgument."""
    from llguidance import LLMatcher, LLParserLimits

    _check(schema)
    try:
        # What is not served in full is refused, whatever the schema says of itself.
        grammar = LLMatcher.grammar_from_json_schema(
            schema, overrides={"lenient": False, "coerce_one_of": False, "whitespace_pattern": _BLANKS}
        )
    except ValueError as error:
        raise InvalidArgument(f"is no JSON schema: {error}", FIELD) from error
    _try(grammar)
    limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, precompute_large_lexemes=False, verbose_errors=False)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    # Whether it admits anything is known with the first mask.
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise _refused(matcher)
    return matcher


def _check(schema: str) -> None:
    try:
        read = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"is no JSON: {error}", FIELD) from error
    if not isinstance(read, dict):
        raise InvalidArgument("is no JSON object", FIELD)
    if is_deeper(read, MAX_DEPTH):
        raise InvalidArgument(f"is nested deeper than {MAX_DEPTH} levels", FIELD)


def _try(grammar: str) -> None:
    command = [sys.executable, "-P", schema_trial.__file__]
    try:
        subprocess.run(command, input=grammar.encode(), capture_output=True, check=True, timeout=_TRIAL_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ResourceExhausted("the verify worker is too busy to read it; try again", FIELD) from error
    except subprocess.CalledProcessError as error:
        raise InvalidArgument(
            f"takes more than {schema_trial.SECONDS} s to read, or 2 GiB; make it simpler", FIELD
        ) from error


def _refused(matcher: LLMatcher) -> InvalidArgument:
    reason = matcher.get_error().partition("\n<non-verbose/>")[0]
    return InvalidArgument(f"answers cannot be held to it: {reason:.400}", FIELD)
