"""What processes hold in memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sequoia.process_memory import available_bytes, container_bytes, peak_bytes, resident_bytes

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


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize(("limit", "left"), [("1000", 1000 - 400 + 150), ("300", 50), ("200", 0), ("max", None)])
def test_a_containers_limit_leaves_what_is_not_used_for_good(
    tmp_path: Path, limit: str, left: int | None, is_nested: bool
) -> None:
    folder = tmp_path / "pods" / "a" if is_nested else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("400\n")
    (folder / "memory.stat").write_text("anon 250\ninactive_file 150\n")
    (tmp_path / "own").write_text("4:memory:/else\n0::/pods/a\n")
    assert container_bytes(tmp_path, tmp_path / "own") == left


def test_without_control_groups_nothing_is_said(tmp_path: Path) -> None:
    assert container_bytes(tmp_path, tmp_path / "own") is None
