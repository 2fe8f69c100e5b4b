"""A growth of either kind, by the shape that was asked for."""

from __future__ import annotations

from typing import TypeAlias

from draft_worker.choosing import Tokens
from draft_worker.dynamic import DynamicGrowth
from draft_worker.growth import Stem
from draft_worker.mixture import Mixture
from draft_worker.planned import PlannedGrowth
from sequoia.engine.children import Calibration
from sequoia.topology import DynamicShape, TreeShape

AnyGrowth: TypeAlias = PlannedGrowth | DynamicGrowth


def begun(
    shape: TreeShape,
    committed: Tokens,
    calibration: Calibration,
    stem: Stem | None = None,
    mixture: Mixture | None = None,
) -> AnyGrowth:
    """A tree that has nothing but its root yet; `calibration` is for the scores of a dynamic one."""
    if isinstance(shape, DynamicShape):
        return DynamicGrowth(shape, committed, calibration, stem, mixture)
    return PlannedGrowth(shape, committed, stem, mixture)
