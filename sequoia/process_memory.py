"""What processes hold in memory, as Linux tells it; files that they map, such as weights, count once they are read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_KIB = 1024


def peak_bytes(process_ids: Iterable[int]) -> int | None:
    """The sum of each one's peak; None when one cannot be read, or there is none."""
    return _sum([_field(each, "VmHWM") for each in process_ids])


def resident_bytes(process_ids: Iterable[int]) -> int | None:
    """The sum at this moment; None as above."""
    return _sum([_field(each, "VmRSS") for each in process_ids])


def anonymous_bytes(process_id: int) -> int | None:
    """What a process holds at this moment beside the files that it maps; None where it is not told."""
    return _field(process_id, "RssAnon")


def available_bytes() -> int | None:
    """What the machine, and the container that this process is in, could give; None where neither tells."""
    known = [_read(Path("/proc/meminfo"), "MemAvailable"), container_bytes()]
    return min((each for each in known if each is not None), default=None)


def container_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the control group's limit leaves, files that can be dropped left out; None without a limit (version 2)."""
    try:
        [path] = [line.rstrip()[3:] for line in own.read_text().splitlines() if line.startswith("0::")]
        # In a container the group's own path is often not there, and its files are at the root.
        folder = next(each for each in (root / path.lstrip("/"), root) if (each / "memory.max").exists())
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        left = int(limit) - int(used) + int(counts.get("inactive_file", 0))
    except (OSError, ValueError, StopIteration):
        return None
    return max(0, left)


def _field(process_id: int, name: str) -> int | None:
    return _read(Path(f"/proc/{process_id}/status"), name)


def _read(file: Path, name: str) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * _KIB for line in lines if line.startswith(f"{name}:")), None)


def _sum(values: list[int | None]) -> int | None:
    known = [each for each in values if each is not None]
    return sum(known) if known and len(known) == len(values) else None
