"""Weights taken out of a module: memory holds them once, where they are read fastest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import READABLE_ARCHITECTURES, write_tiny_model

from sequoia.engine.model import load_model
from sequoia.engine.native.panels import in_huge_pages
from sequoia.engine.sources import resolve
from sequoia.engine.weights import take_weights

_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("architecture", READABLE_ARCHITECTURES)
def test_a_module_whose_weights_are_taken_keeps_none_of_its_file(architecture: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, architecture)
    module = load_model(resolve(str(tmp_path)), dtype="bfloat16", device="cpu").module
    taken = take_weights(module, 64)
    assert list(taken.layers)
    assert sum(parameter.numel() for parameter in module.parameters()) == 0


@pytest.mark.skipif(
    not _PAGES.exists() or "[never]" in _PAGES.read_text(), reason="needs transparent huge pages, switched off here"
)
def test_packed_weights_lie_in_huge_pages() -> None:
    packed = in_huge_pages(torch.ones(32 << 20, dtype=torch.uint8))
    assert _huge_kilobytes(packed.data_ptr()) >= 16 << 10


def _huge_kilobytes(address: int) -> int:
    """Of the mapping that holds an address."""
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            is_inside = start <= address < end
        elif is_inside and first == "AnonHugePages:":
            return int(line.split()[1])
    return 0
