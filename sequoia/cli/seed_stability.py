"""How often a seeded token changes with the forward it is computed in: trees, widths, batches, rebuilt sessions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sequoia.cli.subject import CHUNK, NUM_NEIGHBOURS, Subject, prefill
from sequoia.engine.attention import tree_segment
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVSlot
from sequoia.engine.sampling import coupled_token
from sequoia.sampling import Sampling
from sequoia.topology import TokenTree, Topology

# Levels of the true continuation inside the trees: what a good draft proposes.
_TRUE_LEVELS = 4
_TREE_SIZES = (4, 16, 64)
NUM_WAYS = len(_TREE_SIZES) + 3

# The rows of some consecutive places of a text, (places, vocabulary), one batch of them after another.
Rows = Iterator[Tensor]


@dataclass(frozen=True, slots=True)
class Stability:
    """One way to compute the tokens of a text, each after the same tokens, compared with plain decoding."""

    way: str
    num_tokens: int
    num_flips: int
    max_logit_difference: float
    seconds_per_token: float


@dataclass
class Text:
    """A text written by plain decoding with a seed; `rows` are the logits that decided its tokens."""

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)


@torch.inference_mode()
def measure(
    subject: Subject, prompts: Sequence[tuple[int, ...]], sampling: Sampling, num_tokens: int
) -> Iterator[Stability]:
    """Plain decoding first, then every other way over the same texts. `sampling` has the seed."""
    engine, vocab_size = subject.engine, subject.vocab_size
    texts = [Text(prompt) for prompt in prompts]
    plain = _Tally("plain decoding")
    for text in texts:
        with engine.cache.slot() as slot, plain:
            _write(engine, slot, text, sampling, num_tokens, vocab_size)
    yield plain.result(len(prompts) * num_tokens)
    for way, rows_of in _ways(engine, vocab_size).items():
        tally = _Tally(way)
        for text in texts:
            with engine.cache.slot() as slot, tally:
                rows = torch.cat([rows[:, :vocab_size].double() for rows in rows_of(slot, text)])
            tally.compare(text, rows, sampling)
        yield tally.result(len(prompts) * num_tokens)


class _Tally:
    def __init__(self, way: str) -> None:
        self._way, self._num_flips, self._difference, self._seconds = way, 0, 0.0, 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._started

    def compare(self, text: Text, rows: Tensor, sampling: Sampling) -> None:
        for index, (row, plain, token) in enumerate(zip(rows, text.rows, text.tokens, strict=True)):
            self._num_flips += coupled_token(row, sampling, len(text.prompt) + index) != token
            self._difference = max(self._difference, float((row - plain).abs().max()))

    def result(self, num_tokens: int) -> Stability:
        return Stability(self._way, num_tokens, self._num_flips, self._difference, self._seconds / num_tokens)


def _write(engine: Engine, slot: KVSlot, text: Text, sampling: Sampling, num_tokens: int, vocab_size: int) -> None:
    """The text, one token a forward."""
    prefill(engine, slot, text.prompt[:-1])
    root = text.prompt[-1]
    while len(text.tokens) < num_tokens:
        [rows] = engine.forward([tree_segment(slot, (), TokenTree.root_only(root))])
        slot.keep([0])
        text.rows.append(rows[0, :vocab_size].double())
        root = coupled_token(text.rows[-1], sampling, len(text.prompt) + len(text.tokens))
        text.tokens.append(root)


def _ways(engine: Engine, vocab_size: int) -> dict[str, Callable[[KVSlot, Text], Rows]]:
    trees = {
        f"trees of {size}": lambda slot, text, size=size: _in_trees(engine, slot, text, _Trees(size, vocab_size))
        for size in _TREE_SIZES
    }
    return {
        **trees,
        f"a batch of {1 + NUM_NEIGHBOURS}": lambda slot, text: _in_batches(engine, slot, text),
        "rebuilt sessions": lambda slot, text: _rebuilt(engine, slot, text),
    }


class _Trees:
    """Trees of `size` nodes with a given path somewhere among random siblings."""

    def __init__(self, size: int, vocab_size: int) -> None:
        self.num_levels = min(_TRUE_LEVELS, size)
        self._size, self._vocab_size = size, vocab_size
        self._generator = np.random.default_rng(0)

    def around(self, true: Sequence[int]) -> tuple[TokenTree, list[int]]:
        """A tree with the path `true`, root first, and that path's nodes."""
        generator, num_inner = self._generator, len(true) - 1
        widths = np.ones(num_inner, dtype=int)
        if num_inner:
            widths += np.bincount(generator.integers(0, num_inner, self._size - len(true)), minlength=num_inner)
        parents, tokens, path = [-1], [true[0]], [0]
        for token, width in zip(true[1:], widths.tolist(), strict=True):
            siblings = generator.integers(0, self._vocab_size, width).tolist()
            place = int(generator.integers(0, width))
            siblings[place] = token
            parents += [path[-1]] * width
            path.append(len(tokens) + place)
            tokens += siblings
        return TokenTree(Topology(tuple(parents)), tuple(tokens)), path


def _in_trees(engine: Engine, slot: KVSlot, text: Text, trees: _Trees) -> Rows:
    """Trees that hold the text's next tokens among random others, kept as if they had been accepted."""
    prefill(engine, slot, text.prompt[:-1])
    tokens = [text.prompt[-1], *text.tokens]
    start = 0
    while start < len(text.tokens):
        true = tokens[start : min(start + trees.num_levels, len(text.tokens))]
        tree, path = trees.around(true)
        [rows] = engine.forward([tree_segment(slot, (), tree)])
        slot.keep(path)
        yield rows[path]
        start += len(true)


def _in_batches(engine: Engine, slot: KVSlot, text: Text) -> Rows:
    """One token a forward, beside other sessions that decode the same text from other places on."""
    prefill(engine, slot, text.prompt[:-1])
    tokens = [text.prompt[-1], *text.tokens]
    with ExitStack() as stack:
        others = [stack.enter_context(engine.cache.slot()) for _ in range(NUM_NEIGHBOURS)]
        for index, token in enumerate(tokens[:-1]):
            roots = [(slot, token), *((other, tokens[-1 - index]) for other in others[:index])]
            rows, *_ = engine.forward([tree_segment(each, (), TokenTree.root_only(root)) for each, root in roots])
            for each, _ in roots:
                each.keep([0])
            yield rows


def _rebuilt(engine: Engine, slot: KVSlot, text: Text) -> Rows:
    """Prompt and text fed again in chunks, as a session is that was lost and opened elsewhere."""
    tokens = (*text.prompt, *text.tokens)[:-1]
    first = len(text.prompt) - 1
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK]
        [rows] = engine.forward([tree_segment(slot, (), TokenTree(Topology.chain(len(part)), part))])
        slot.keep(range(len(part)))
        yield rows[max(0, first - start) :]
