"""The short form of `python tests/hostile.py`: every message gets a named status, other sessions are undisturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import start_tiny_system
from hostile import attack


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_hostile_messages_are_refused_by_name(tmp_path: Path) -> None:
    for system in start_tiny_system(tmp_path, "llama"):
        outcome = attack(system, 2000, seed=3)
    assert outcome.problems == []
    assert outcome.num_undisturbed > 5
    assert sum(count for status, count in outcome.statuses.items() if "INVALID" in status) > 100
