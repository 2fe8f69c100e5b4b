"""Arithmetic that does not depend on what shares a forward: slower, and the same bits for a row in any company.

Two things move a row's logits with the forward it is in: kernels that choose their blocking by the number of rows, and
attention that sums over other rows in another order. Here every linear layer is called with the same number of rows,
and every token attends, alone, to exactly the rows on its own path, in the order of their positions. Rows that are
rebuilt from the committed tokens go the same way as those that were decoded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from sequoia.engine.attention import PackedBatch

DETERMINISTIC_ATTENTION = "tree_deterministic"
# Rows in every call of a linear layer.
_NUM_ROWS = 16


class FixedRowsLinear(nn.Module):
    """A linear layer that is always called with 16 rows; what is missing is filled up with zeros."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self) -> Tensor:
        """The layer's own: models look at its dtype."""
        return self._linear.weight

    def forward(self, rows: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """The product."""
        flat = rows.reshape(-1, self.in_features)
        filled = pad(flat, (0, 0, 0, -len(flat) % _NUM_ROWS))
        output = (
            torch.cat([self._linear(block.contiguous()) for block in filled.split(_NUM_ROWS)]) if len(flat) else flat
        )
        return output[: len(flat)].reshape(*rows.shape[:-1], self.out_features)


def deterministic_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head size)
    key: Tensor,  # (kv heads, pool rows, head size)
    value: Tensor,  # (kv heads, pool rows, value size)
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed_batch: PackedBatch,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention function of the `transformers` registry, token by token. Returns (1, tokens, heads, value size)."""
    groups = query.shape[1] // key.shape[0]
    attended = []
    for index, rows in enumerate(packed_batch.visible_rows(sliding_window)):
        folded = query[0, :, index].reshape(1, key.shape[0], groups, -1)
        one = scaled_dot_product_attention(folded, key[None, :, rows], value[None, :, rows], scale=scaling)
        attended.append(one.reshape(query.shape[1], -1))
    return torch.stack(attended)[None], None


def make_deterministic(module: nn.Module) -> None:
    """Replace every nn.Linear in `module`, the head included."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            module.set_submodule(name, FixedRowsLinear(layer))


def register() -> None:
    """Make `attn_implementation="tree_deterministic"` known."""
    AttentionInterface.register(DETERMINISTIC_ATTENTION, deterministic_attention)
