"""How far rounding a target's weights moves what it says: along its own greedy texts, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from sequoia.cli.subject import CHUNK, Subject, prefill
from sequoia.engine.attention import tree_segment
from sequoia.engine.kv_cache import KVSlot
from sequoia.errors import InvalidArgument
from sequoia.topology import TokenTree, Topology


@dataclass(frozen=True, slots=True)
class GreedyText:
    """What the target wrote greedily behind a prompt, its end-of-sequence token included, and why."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logits: Tensor  # (tokens, vocabulary) float32 on the CPU: the rows that decided the tokens


@dataclass(frozen=True, slots=True)
class TextDrift:
    """One text under a rounded target, which was fed the same tokens: a figure a position."""

    are_equal: tuple[bool, ...]  # whether the likeliest token is the text's
    divergences: tuple[float, ...]  # KL(p || p of the rounded target) at T = 1, in nats

    @property
    def first_difference(self) -> int | None:
        """Where a greedy text of the rounded target leaves this one, counted from 0; None when it does not.

        Up to there it is fed nothing but its own choices: it need not be written to know.
        """
        return None if all(self.are_equal) else self.are_equal.index(False)


@dataclass(frozen=True)
class Drift:
    """All texts under one rounded target."""

    quantization: str
    texts: tuple[TextDrift, ...]

    @property
    def num_positions(self) -> int:
        """Of all texts."""
        return sum(len(each.are_equal) for each in self.texts)

    @property
    def argmax_share(self) -> float:
        """Of positions whose likeliest token is the same."""
        return sum(sum(each.are_equal) for each in self.texts) / self.num_positions

    @cached_property
    def divergences(self) -> list[float]:
        """Of all positions, ascending, in nats."""
        return sorted(value for each in self.texts for value in each.divergences)

    @property
    def mean_divergence(self) -> float:
        """Over all positions, in nats."""
        return mean(self.divergences)

    def num_equal_texts(self, num_tokens: int) -> int:
        """Prompts on which the first `num_tokens` tokens of greedy text are the same, or all of a shorter text."""
        return sum(each.first_difference is None or each.first_difference >= num_tokens for each in self.texts)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "quantization": self.quantization,
            "num_texts": len(self.texts),
            "num_positions": self.num_positions,
            "argmax_share": self.argmax_share,
            "mean_divergence": self.mean_divergence,
            "median_divergence": self.divergences[len(self.divergences) // 2],
            "largest_divergence": self.divergences[-1],
            "first_differences": [each.first_difference for each in self.texts],
        }


@torch.inference_mode()
def write(
    target: Subject, prompts: Sequence[tuple[int, ...]], num_tokens: int, on_progress: Callable[[int, int], None]
) -> list[GreedyText]:
    """A text a prompt, up to so many tokens. Raises InvalidArgument naming `tokens` where one does not fit."""
    longest = max(map(len, prompts)) + num_tokens
    if longest > target.context_length:
        problem = f"a prompt and its text take {longest} tokens; the context has {target.context_length}"
        raise InvalidArgument(problem, "tokens")
    texts = []
    for index, prompt in enumerate(prompts):
        on_progress(index, len(prompts))
        with target.engine.cache.slot() as slot:
            rows = list(_greedy_rows(target, slot, prompt, num_tokens))
        token_ids = tuple(int(row.argmax()) for row in rows)
        texts.append(GreedyText(prompt, token_ids, torch.stack(rows)))
    return texts


@torch.inference_mode()
def compare(
    rounded: Subject, quantization: str, texts: Sequence[GreedyText], on_progress: Callable[[int, int], None]
) -> Drift:
    """Every text fed to the rounded target."""
    found = []
    for index, text in enumerate(texts):
        on_progress(index, len(texts))
        with rounded.engine.cache.slot() as slot:
            logits = torch.cat(list(_forced_rows(rounded, slot, text)))
        found.append(text_drift(text, logits))
    return Drift(quantization, tuple(found))


def text_drift(text: GreedyText, logits: Tensor) -> TextDrift:
    """`logits` (tokens, vocabulary) are the rounded target's for the tokens of the text."""
    p, q = text.logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    # A token that p never says adds nothing, whatever q thinks of it.
    divergences = torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)
    are_equal = logits.argmax(-1) == torch.tensor(text.token_ids)
    return TextDrift(tuple(are_equal.tolist()), tuple(divergences.tolist()))


def _greedy_rows(target: Subject, slot: KVSlot, prompt: tuple[int, ...], num_tokens: int) -> Iterator[Tensor]:
    """One row a forward, until the text ends."""
    prefill(target.engine, slot, prompt[:-1])
    root = prompt[-1]
    for _ in range(num_tokens):
        [logits] = target.engine.forward([tree_segment(slot, (), TokenTree.root_only(root))])
        slot.keep([0])
        row = _readable(target, logits)[0]
        yield row
        root = int(row.argmax())
        if root in target.codec.eos_token_ids:
            return


def _forced_rows(target: Subject, slot: KVSlot, text: GreedyText) -> Iterator[Tensor]:
    """The rows of the text's tokens, some at a time."""
    prefill(target.engine, slot, text.prompt[:-1])
    fed = (text.prompt[-1], *text.token_ids[:-1])
    for start in range(0, len(fed), CHUNK):
        part = fed[start : start + CHUNK]
        [logits] = target.engine.forward([tree_segment(slot, (), TokenTree(Topology.chain(len(part)), part))])
        slot.keep(range(len(part)))
        yield _readable(target, logits)


def _readable(target: Subject, logits: Tensor) -> Tensor:
    """A copy without the padding of the vocabulary; what an engine returns may be written again."""
    return logits[:, : target.vocab_size].to("cpu", torch.float32, copy=True)
