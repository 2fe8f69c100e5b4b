"""Documents as batches: of about the same length side by side, padded, with what is to be learnt of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sequoia.engine.distillation.corpus import Document

# What is asked teaches too, but a draft only ever writes answers.
_QUESTION_WEIGHT = 0.2
# Documents are sorted by length up to this many tokens of chance, so that batches differ from epoch to epoch.
_SHUFFLE_TOKENS = 8.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded documents, each without its last token, behind which nothing is known."""

    token_ids: Tensor  # (documents, tokens) int64
    weights: Tensor  # (documents, tokens) float32; 0: padding, 1: an answer's token comes next
    teacher_ids: Tensor  # (documents, tokens, TEACHER_WIDTH) int64
    teacher_p: Tensor  # the same shape, float32

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__slots__))


def collate(documents: Sequence[Document]) -> Batch:
    """Side by side; the longest one's length."""
    return Batch(
        pad_sequence([each.token_ids[:-1].long() for each in documents], batch_first=True),
        pad_sequence([_weights(each) for each in documents], batch_first=True),
        pad_sequence([each.teacher_ids.long() for each in documents], batch_first=True),
        pad_sequence([each.teacher_logprobs.float().exp() for each in documents], batch_first=True),
    )


def grouped(documents: Sequence[Document], num_tokens: int, generator: torch.Generator) -> list[list[Document]]:
    """All of them in groups of at most `num_tokens` padded tokens (or one document), in an order of chance."""
    chance = torch.rand(len(documents), generator=generator) * _SHUFFLE_TOKENS
    lengths = [len(each.token_ids) for each in documents]
    groups: list[list[Document]] = []
    longest = 0
    for index in sorted(range(len(documents)), key=lambda index: lengths[index] + float(chance[index])):
        longest = max(longest, lengths[index])
        if not groups or (len(groups[-1]) + 1) * longest > num_tokens:
            groups.append([])
            longest = lengths[index]
        groups[-1].append(documents[index])
    return [groups[index] for index in torch.randperm(len(groups), generator=generator)]


def _weights(document: Document) -> Tensor:
    weights = torch.ones(len(document.token_ids) - 1)
    weights[: max(document.answer_start - 1, 0)] = _QUESTION_WEIGHT
    return weights
