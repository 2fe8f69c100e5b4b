"""Environments of peers: made once, again for other pins, and a package that is not to be had."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from sequoia.cli.benchmarks.peer_environments import Environment, python_of
from sequoia.cli.benchmarks.peer_process import PeerFailed
from sequoia.cli.steps import Steps

QUIET = Steps(Console(quiet=True))


def test_none_is_our_own_environment(tmp_path: Path) -> None:
    assert python_of(None, tmp_path, QUIET) == Path(sys.executable)


def test_an_environment_is_made_once_and_again_for_other_pins(tmp_path: Path) -> None:
    said = io.StringIO()
    steps = Steps(Console(file=said))
    pythons = [python_of(Environment("empty", ()), tmp_path, steps) for _ in range(2)]
    assert said.getvalue().count("installing empty into") == 2, "once at its beginning, once at its end"
    python_of(Environment("empty", (), removes=("setuptools",)), tmp_path, steps)
    assert said.getvalue().count("installing empty into") == 4
    where = subprocess.run(
        [pythons[0], "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True
    )
    assert Path(where.stdout.strip()) == tmp_path / "empty"


def test_what_pip_cannot_install_is_a_reason_and_is_tried_again(tmp_path: Path) -> None:
    missing = Environment("missing", ((str(tmp_path / "no-such.whl"),),))
    for _ in range(2):
        with pytest.raises(PeerFailed, match=r"cannot be installed: .*no-such\.whl"):
            python_of(missing, tmp_path, QUIET)
