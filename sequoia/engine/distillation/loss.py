"""How far a student's distribution is from its target's: cross entropy over the vocabulary, a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Rows of logits that are in memory at a time: few enough that they stay near the processor.
_CHUNK = 256


class HeadLoss(torch.autograd.Function):
    """sum over rows of weight * -sum_k p_k log q(k), the student's q from its head, logits and all.

    Its gradients are made along with it, so that no row of logits is kept and none is read twice from memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (rows, hidden size)
        head: Tensor,  # (known tokens, hidden size) float32
        token_ids: Tensor,  # (rows, width) int64, where p is not zero
        p: Tensor,  # the same shape, float32; need not sum to 1
        weights: Tensor,  # (rows,) float32
    ) -> Tensor:
        """In bfloat16 but for the sums. Returns a scalar, float32."""
        table = head.bfloat16()
        loss = hidden.new_zeros((), dtype=torch.float32)
        to_hidden, to_head = torch.empty_like(hidden), torch.zeros_like(head)
        for start in range(0, len(hidden), _CHUNK):
            rows = slice(start, start + _CHUNK)
            narrow = hidden[rows].bfloat16()
            logits = (narrow @ table.T).float()
            own, mass = weights[rows], p[rows].sum(1)
            peaks = logits.amax(1, keepdim=True)
            expected = (p[rows] * logits.gather(1, token_ids[rows])).sum(1)
            sums = logits.sub_(peaks).exp_().sum(1)
            loss += (own * (mass * (sums.log() + peaks[:, 0]) - expected)).sum()
            logits.mul_((own * mass / sums)[:, None])
            logits.scatter_add_(1, token_ids[rows], -own[:, None] * p[rows])
            slopes = logits.bfloat16()
            to_hidden[rows] = slopes @ table
            to_head += slopes.T @ narrow
        ctx.save_for_backward(to_hidden, to_head)
        return loss

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        """Those made before, times the loss's own."""
        to_hidden, to_head = ctx.saved_tensors
        return to_hidden * slopes[0], to_head * slopes[0], None, None, None
