"""The short form of `python tests/chaos.py`: every answer is the undisturbed one, whatever is killed on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_requests_survive_random_faults(tmp_path: Path) -> None:
    outcome = run(60, 7, tmp_path)
    assert outcome.problems == []
    assert sum(outcome.survived.values()) == 60
    assert len(outcome.survived) > 10, "of many kinds"
