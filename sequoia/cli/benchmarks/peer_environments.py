"""The virtual environments of peers: made on demand in the user's cache, of pinned versions, and kept."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from sequoia.cli.benchmarks.peer_process import PeerFailed
from sequoia.cli.steps import Steps

_PIP_TIMEOUT_SECONDS = 1800.0
_NUM_TAIL_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Environment:
    """What pip installs, one list after the other, and what it takes out again."""

    name: str
    installs: tuple[tuple[str, ...], ...]
    # Packages that others ask for, do without, and break on.
    removes: tuple[str, ...] = ()


def python_of(environment: Environment | None, folder: Path, steps: Steps) -> Path:
    """The interpreter, its environment made in `folder` when it is not there; ours for None. Raises PeerFailed."""
    if environment is None:
        return Path(sys.executable)
    home = folder / environment.name
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{environment.name}.lock"):
        # Other pins make another environment of it.
        receipt, wanted = home / "sequoia-receipt", repr(environment)
        if not receipt.exists() or receipt.read_text() != wanted:
            with steps.step(f"installing {environment.name} into {home}"):
                _make(environment, home)
            receipt.write_text(wanted)
    return home / "bin" / "python"


def _make(environment: Environment, home: Path) -> None:
    _run([sys.executable, "-m", "venv", str(home)])
    pip = [str(home / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    for requirements in environment.installs:
        _run([*pip, "install", *requirements])
    if environment.removes:
        _run([*pip, "uninstall", "--yes", *environment.removes])


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PIP_TIMEOUT_SECONDS)
    except subprocess.CalledProcessError as error:
        raise PeerFailed(f"cannot be installed: {error.stderr.strip()[-_NUM_TAIL_CHARACTERS:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerFailed(f"cannot be installed: {error}") from error
