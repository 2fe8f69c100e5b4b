"""Of a draft's tokens those that it proposes: its head has no rows for others, and so costs less."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sequoia.errors import InvalidArgument

# Beside a model's weights. A model without it proposes every token of its tokenizer.
FILE = "draft_vocabulary.safetensors"


@dataclass(frozen=True)
class DraftVocabulary:
    """Which tokens a draft proposes; it reads all of them (FR-Spec, Zhao et al. 2025, arXiv 2502.14856).

    Its logits have a row for each, in their order. Everybody else speaks of tokens by the target's ids: the engine
    translates what comes out. A token that is never proposed costs acceptance and nothing else.
    """

    token_ids: Tensor  # (known,) int64, ascending, on the model's device: the target's ids
    size: int  # tokens of the target's vocabulary

    @property
    def num_known(self) -> int:
        """Tokens that the draft proposes."""
        return len(self.token_ids)

    @cached_property
    def rows(self) -> Tensor:
        """(size,) int64: the logit of each of the target's tokens; `num_known` where there is none."""
        rows = torch.full((self.size,), self.num_known, device=self.token_ids.device)
        rows[self.token_ids] = torch.arange(self.num_known, device=rows.device)
        return rows

    def num_known_below(self, token_id: int) -> int:
        """Tokens that the draft proposes, of the target's first `token_id` ones."""
        return self.num_known if token_id >= self.size else int((self.token_ids < token_id).sum())

    def widened(self, logits: Tensor) -> Tensor:
        """Logits (rows, known) by the target's ids, (rows, size); -inf for others."""
        wide = logits.new_full((len(logits), self.size), -torch.inf)
        return wide.index_copy_(1, self.token_ids, logits)

    def save(self, folder: Path) -> None:
        """Beside the weights in `folder`."""
        save_file({"token_ids": self.token_ids.cpu()}, folder / FILE)


@torch.no_grad()
def narrow_head(module: PreTrainedModel, token_ids: Tensor) -> None:
    """Leave the head only the rows of these tokens, (known,) int64; the embedding stays as it is."""
    head = module.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    narrow = nn.Linear(head.in_features, len(token_ids), bias=head.bias is not None, device="meta")
    narrow.weight = nn.Parameter(head.weight[token_ids], requires_grad=False)
    if head.bias is not None:
        narrow.bias = nn.Parameter(head.bias[token_ids], requires_grad=False)
    module.set_output_embeddings(narrow)


def read_vocabulary(folder: Path, size: int, num_rows: int, device: torch.device) -> DraftVocabulary | None:
    """That of the model in `folder`, whose head has `num_rows` rows; None when it proposes all `size` tokens.

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
    if not is_ascending or token_ids[0] < 0 or token_ids[-1] >= min(size, num_rows) or known >= num_rows:
        raise InvalidArgument(
            f"{path} does not fit its model: {known} ascending token ids below {size}, fewer than the model's "
            f"{num_rows} rows, are needed; train the draft again",
            "model",
        )
    return DraftVocabulary(token_ids.to(device), size)
