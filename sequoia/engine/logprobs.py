"""Logarithms of the probabilities that the generated tokens had, and their likeliest alternatives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sequoia.engine.transfer import download, upload
from sequoia.topology import TokenLogprobs


def token_logprobs(logits: Tensor, weights: Tensor, token_ids: Sequence[int], count: int) -> tuple[TokenLogprobs, ...]:
    """Of each row's token, and of the `count` likeliest tokens by the model itself; reads from the device once.

    Raw: of the model's logits as they are, (tokens, vocabulary). Processed: of weights, log p up to a constant, alike.
    """
    raw, processed = logits.double().log_softmax(1), weights.double().log_softmax(1)
    [own] = upload((np.array(token_ids)[:, None],), logits.device)
    ids = torch.cat([own, raw.topk(min(count, raw.shape[1])).indices], dim=1)
    columns = download((ids, raw.gather(1, ids), processed.gather(1, ids)))
    rows = (zip(*row, strict=True) for row in zip(*(each.tolist() for each in columns), strict=True))
    return tuple(TokenLogprobs(token_id, own_raw, own, tuple(top)) for (token_id, own_raw, own), *top in rows)
