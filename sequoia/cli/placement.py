"""Where coordinator and workers run: in one process, or each in its own; there also on cores of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from sequoia.errors import InvalidArgument

PLACEMENTS = ("auto", "colocated", "split")

# What a worker's flags begin with where those of both are given together.
FLAG_PREFIX = {"verify": "target", "draft": "draft"}

Cores = Mapping[str, tuple[int, ...]]


def decide(asked: str, devices: Sequence[str], cores: Cores) -> str:
    """Colocated or split. `devices` are the workers' as their flags name them, `cores` those that they are pinned to.

    Auto is colocated when both are on one device. Raises InvalidArgument naming `placement` for what cannot be.
    """
    if asked == "colocated":
        _check_colocated(devices, cores)
        return "colocated"
    is_shared = asked == "auto" and len(devices) > 1 and not cores and _is_one_device(devices)
    return "colocated" if is_shared else "split"


def describe(placement: str, cores: Cores) -> str:
    """For people."""
    if placement == "colocated":
        return "colocated, all in one process, where the models take turns"
    pinned = (f"{name} on cores {', '.join(map(str, numbers))}" for name, numbers in cores.items())
    return ", ".join(["split, a process for each worker", *pinned])


def divide_cores(asked: Mapping[str, int | None], available: Iterable[int]) -> dict[str, tuple[int, ...]]:
    """The cores of each worker, none of them in common; empty when no number is asked for.

    A worker without a number gets what the other leaves. Raises InvalidArgument naming the flag for a number below 1,
    and when they are more than there are.
    """
    if all(number is None for number in asked.values()):
        return {}
    pool = sorted(available)
    left = max(1, len(pool) - sum(number or 0 for number in asked.values()))
    numbers = {name: left if number is None else number for name, number in asked.items()}
    _check_cores(numbers, len(pool))
    cores = iter(pool)
    return {name: tuple(islice(cores, number)) for name, number in numbers.items()}


def available_cores() -> set[int]:
    """The cores that this process may use. Raises InvalidArgument where it cannot be pinned to some of them."""
    if not hasattr(os, "sched_getaffinity"):
        raise InvalidArgument("this operating system pins no process to cores", "target-cores")
    return os.sched_getaffinity(0)


def _check_colocated(devices: Sequence[str], cores: Cores) -> None:
    if len(devices) < 2:
        raise InvalidArgument("colocated is for two workers, and there is no draft", "placement")
    if cores:
        raise InvalidArgument("colocated workers have no cores of their own: choose split", "placement")


def _check_cores(numbers: Mapping[str, int], num_available: int) -> None:
    flags = {f"{FLAG_PREFIX[name]}-cores": number for name, number in numbers.items()}
    for flag, number in flags.items():
        if number < 1:
            raise InvalidArgument(f"is {number}; it must be 1 or more", flag)
    if sum(numbers.values()) > num_available:
        wanted = " and ".join(f"--{flag} {number}" for flag, number in flags.items())
        raise InvalidArgument(f"{wanted} are more than the {num_available} cores that there are", next(iter(flags)))


def _is_one_device(devices: Sequence[str]) -> bool:
    """Whether flags name one device: `auto` is the first CUDA device, or the CPU where there is none."""
    return len(set(devices)) == 1 or (set(devices) == {"auto", "cpu"} and not _has_cuda())


def _has_cuda() -> bool:
    """Whether torch finds a CUDA device: asked in a process of its own, and only where there is a driver."""
    if not any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg")):
        return False
    program = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-P", "-c", program], stdin=subprocess.DEVNULL).returncode == 0
