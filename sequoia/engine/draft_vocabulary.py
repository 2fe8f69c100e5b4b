"""A draft's own vocabulary: a choice of its target's tokens, so that its embedding and its head stay small."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sequoia.engine.attention import Segment
from sequoia.errors import InvalidArgument

# Beside a model's weights. A model without it knows every token of its tokenizer.
FILE = "draft_vocabulary.safetensors"


@dataclass(frozen=True)
class DraftVocabulary:
    """Which tokens a draft knows. Its first rows are theirs; the row behind them stands for all others, as an input.

    Everybody else speaks of tokens by the target's ids: the engine translates what goes into a forward and what comes
    out. A token that the draft does not know is never proposed, which costs acceptance and nothing else.
    """

    token_ids: Tensor  # (known,) int64, ascending, on the model's device: the target's ids
    size: int  # tokens of the target's vocabulary

    @property
    def num_known(self) -> int:
        """Tokens that the draft knows."""
        return len(self.token_ids)

    @cached_property
    def rows(self) -> Tensor:
        """(size,) int64: the draft's row of each of the target's tokens."""
        rows = torch.full((self.size,), self.num_known, device=self.token_ids.device)
        rows[self.token_ids] = torch.arange(self.num_known, device=rows.device)
        return rows

    def num_known_below(self, token_id: int) -> int:
        """Tokens that the draft knows, of the target's first `token_id` ones."""
        return self.num_known if token_id >= self.size else int((self.token_ids < token_id).sum())

    def narrowed(self, segment: Segment) -> Segment:
        """The same tokens by the draft's rows."""
        ids = segment.token_ids
        if isinstance(ids, Tensor):
            return replace(segment, token_ids=self.rows[ids])
        return replace(segment, token_ids=tuple(self._host_rows[list(ids)].tolist()))

    def widened(self, logits: Tensor) -> Tensor:
        """Logits (rows, the draft's) by the target's ids, (rows, size); -inf for unknown tokens."""
        wide = logits.new_full((len(logits), self.size), -torch.inf)
        return wide.index_copy_(1, self.token_ids, logits[:, : self.num_known])

    def save(self, folder: Path) -> None:
        """Beside the weights in `folder`."""
        save_file({"token_ids": self.token_ids.cpu()}, folder / FILE)

    @cached_property
    def _host_rows(self) -> np.ndarray:
        return self.rows.cpu().numpy()


def rows_of(table: Tensor, token_ids: Tensor) -> Tensor:
    """Of a table (tokens, width): the rows of those tokens, and one more, the mean of all, for the others."""
    return torch.cat([table[token_ids], table.mean(0, keepdim=True)])


def read_vocabulary(folder: Path, size: int, num_rows: int, device: torch.device) -> DraftVocabulary | None:
    """That of the model in `folder`, of `num_rows` rows; None when it knows all `size` tokens of its tokenizer.

    Raises InvalidArgument naming `model` when it does not belong to the model.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        token_ids = load_file(path)["token_ids"].long()
    except (OSError, KeyError, SafetensorError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}; train the draft again", "model") from error
    known = len(token_ids)
    is_ascending = bool((token_ids.diff() > 0).all()) and known > 0
    if not is_ascending or token_ids[0] < 0 or token_ids[-1] >= size or known >= num_rows:
        raise InvalidArgument(
            f"{path} does not fit its model: {known} ascending token ids below {size}, fewer than the model's "
            f"{num_rows} rows, are needed; train the draft again",
            "model",
        )
    return DraftVocabulary(token_ids.to(device), size)
