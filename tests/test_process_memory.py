"""What processes hold in memory."""

from __future__ import annotations

import os

from sequoia.process_memory import available_bytes, peak_bytes, resident_bytes

MIB = 2**20


def test_a_peak_is_at_least_what_is_held_now_and_processes_add_up() -> None:
    resident, peak = resident_bytes([os.getpid()]), peak_bytes([os.getpid()])
    assert resident is not None
    assert peak is not None
    assert MIB < resident <= peak
    assert peak_bytes([os.getpid()] * 2) == 2 * peak
    assert (available_bytes() or 0) > MIB


def test_nothing_is_said_of_processes_that_are_gone_or_elsewhere() -> None:
    assert peak_bytes([os.getpid(), 2**22 + 1]) is None
    assert peak_bytes([]) is None
