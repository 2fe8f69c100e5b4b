"""The largest entries of a long row, found without sorting it: on the host, in two passes over it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sequoia.topology import Int

# Long enough that the maxima are few, short enough that those wanted cut off most of the row.
_MOST_IN_A_BLOCK = 256
_BLOCKS_PER_WANTED = 4


def largest(values: NDArray[np.floating], count: int) -> Int:
    """Indices of the `count` largest of `values` (n,), int64, by (value descending, index ascending).

    Fewer where fewer are above -inf; NaN is never among them. Maxima of disjoint blocks are values too, so the
    count-th largest of them is not above the count-th largest value, and what is below it is passed over.
    """
    count = min(count, len(values))
    if not count:
        return np.empty(0, np.int64)
    # At least as many blocks as entries are wanted.
    length = max(1, min(_MOST_IN_A_BLOCK, len(values) // (_BLOCKS_PER_WANTED * count)))
    maxima = np.nan_to_num(_block_maxima(values, length), copy=False, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    least = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
    candidates = np.flatnonzero(values >= least if least > -np.inf else values > least)
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]


def on_host(row: Tensor) -> NDArray[np.floating]:
    """A row's entries on the host: float32 for the 16-bit types, which it holds exactly."""
    wide = row if row.dtype in (torch.float32, torch.float64) else row.float()
    return wide.cpu().numpy()


def _block_maxima(values: NDArray[np.floating], length: int) -> NDArray[np.floating]:
    whole = len(values) // length * length
    blocks = torch.from_numpy(values[:whole]).view(-1, length).amax(1).numpy()
    return np.append(blocks, values[whole:].max()) if whole < len(values) else blocks
