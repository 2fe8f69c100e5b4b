"""The tests are tested: every deliberate fault is caught by one of them."""

from __future__ import annotations

import pytest
from mutations import FAULTS, caught

from sequoia.rules import RULES


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_three_faults_at_least(rule: str) -> None:
    assert sum(fault.rule == rule for fault in FAULTS) >= 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_deliberate_fault_is_caught() -> None:
    assert [fault.what for fault, test in caught() if test is None] == []
