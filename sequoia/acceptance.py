"""Acceptance by rank: what was counted while speculating, and the vector that the planner builds trees from."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

# Chen et al. 2024 (arXiv 2402.12374), appendix E: Llama3-70B drafted by its 8B on CNN/DailyMail, the first 16 ranks.
PRIOR = (
    *(0.7732, 0.1039, 0.0402, 0.0206, 0.0128, 0.0081, 0.0064, 0.0043),
    *(0.0035, 0.0026, 0.0025, 0.0021, 0.0016, 0.0014, 0.0010, 0.0010),
)

_PRIOR_STRENGTH = 4.0
# Below 1, so that no finite tree is predicted to be accepted for ever.
_MAX_SUM = 0.999


@dataclass(frozen=True, slots=True)
class AcceptanceCounts:
    """How often a child of each rank stood under a reached node (`offered`) and was the accepted one (`accepted`).

    Raises ValueError unless `0 <= accepted[rank] <= offered[rank]` at every rank.
    """

    offered: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.accepted) > len(self.offered):
            raise ValueError(f"{len(self.accepted)} ranks accepted, but {len(self.offered)} offered")
        padded = self.accepted + (0,) * (len(self.offered) - len(self.accepted))
        if any(not 0 <= accepted <= offered for offered, accepted in zip(self.offered, padded, strict=True)):
            raise ValueError(f"accepted {padded} must lie between 0 and offered {self.offered} at every rank")
        object.__setattr__(self, "accepted", padded)

    def __add__(self, other: AcceptanceCounts) -> AcceptanceCounts:
        """The counts of both, rank by rank."""
        return AcceptanceCounts(_added(self.offered, other.offered), _added(self.accepted, other.accepted))

    def vector(self, prior_strength: float = _PRIOR_STRENGTH) -> tuple[float, ...]:
        """P(child of that rank is the accepted one | parent reached), by rank, summing to less than 1.

        `(accepted + prior_strength * PRIOR) / (offered + prior_strength)`: PRIOR counts as that many offers, so that a
        rank seen seldom is neither certain nor impossible, and one never offered has the prior's value. Mass beyond
        0.999 is taken from the last ranks. `prior_strength` must be positive.
        """
        num_ranks = max(len(self.offered), len(PRIOR))
        prior, offered, accepted = (_padded(each, num_ranks) for each in (PRIOR, self.offered, self.accepted))
        smoothed = (accepted + prior_strength * prior) / (offered + prior_strength)
        left = np.maximum(_MAX_SUM - (smoothed.cumsum() - smoothed), 0.0)
        return tuple(np.minimum(smoothed, left).tolist())


def _added(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(left, right, fillvalue=0))


def _padded(values: tuple[float, ...], length: int) -> np.ndarray:
    return np.pad(np.asarray(values, dtype=np.float64), (0, length - len(values)))
