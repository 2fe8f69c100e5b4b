"""The control plane stays light: the layers themselves are checked by import-linter in `make lint`."""

from __future__ import annotations

import subprocess
import sys

import pytest

CONTROL_PLANE = (
    "sequoia",
    "sequoia.client",
    "coordinator.server",
    "coordinator.gateway.server",
    "coordinator.planner_job",
    "sequoia.cli",
)


@pytest.mark.parametrize("module", CONTROL_PLANE)
def test_control_plane_loads_no_model_library(module: str) -> None:
    program = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
