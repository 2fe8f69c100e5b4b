"""Text with its target's distributions, in shards on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Tokens of the target's distribution that are kept, and trained on: the mass outside is next to nothing.
TEACHER_WIDTH = 32


@dataclass(frozen=True, slots=True)
class Document:
    """A text, and what the target expected behind each of its tokens but the last."""

    token_ids: Tensor  # (tokens,) int32
    answer_start: int  # index of the first token that answers; what is before it was asked
    teacher_ids: Tensor  # (tokens - 1, TEACHER_WIDTH) int32, likeliest first
    teacher_logprobs: Tensor  # the same shape, float16


@dataclass(frozen=True, slots=True)
class Shard:
    """Documents one behind another."""

    token_ids: Tensor  # (tokens,) int32
    lengths: Tensor  # (documents,) int32
    answer_starts: Tensor  # (documents,) int32
    teacher_ids: Tensor  # (tokens, TEACHER_WIDTH) int32; zeros behind a document's last token
    teacher_logprobs: Tensor  # the same shape, float16

    @classmethod
    def of(cls, documents: Sequence[Document]) -> Shard:
        """All of them in one."""
        padding = (0, 0, 0, 1)
        return cls(
            torch.cat([each.token_ids for each in documents]),
            torch.tensor([len(each.token_ids) for each in documents], dtype=torch.int32),
            torch.tensor([each.answer_start for each in documents], dtype=torch.int32),
            torch.cat([torch.nn.functional.pad(each.teacher_ids, padding) for each in documents]),
            torch.cat([torch.nn.functional.pad(each.teacher_logprobs, padding) for each in documents]),
        )

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return len(self.token_ids)

    def expected(self, vocab_size: int) -> Tensor:
        """(vocab_size,) float32: how often the target expected each token, in tokens."""
        p = self.teacher_logprobs.float().exp()
        p[self.lengths.cumsum(0) - 1] = 0.0
        mass = torch.zeros(vocab_size)
        return mass.index_add_(0, self.teacher_ids.flatten().long(), p.flatten())

    def documents(self) -> Iterator[Document]:
        """One by one."""
        start = 0
        for length, answer_start in zip(self.lengths.tolist(), self.answer_starts.tolist(), strict=True):
            own, pairs = slice(start, start + length), slice(start, start + length - 1)
            yield Document(self.token_ids[own], answer_start, self.teacher_ids[pairs], self.teacher_logprobs[pairs])
            start += length

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        partial = path.with_suffix(".partial")
        save_file({name: getattr(self, name) for name in self.__slots__}, partial)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Shard:
        """What `save` wrote."""
        return cls(**load_file(path))
