"""What this machine has for a worker: packages, processor, memory, compiler."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from sequoia.cli.checkup.finding import Finding
from sequoia.config import num_cores
from sequoia.process_memory import available_bytes

_GIB = 2**30
_SERVED_WITH = ("sequoia-serving", "grpcio", "protobuf", "redis", "tokenizers")
_WORKER = ("torch", "transformers", "safetensors")
_LITTLE_BYTES = 2 * _GIB


def check_machine() -> Iterator[Finding]:
    """Of the machine that `sequoia doctor` runs on."""
    known = {name: _version(name) for name in (*_SERVED_WITH, *_WORKER)}
    told = ", ".join(f"{name} {found}" for name, found in known.items() if found)
    yield Finding("versions", "good", f"Python {platform.python_version()}, {told}")
    if missing := [name for name in _WORKER if not known[name]]:
        remedy = "a worker needs them: pip install sequoia-serving[worker] (torch first, for the CPU or for CUDA)"
        yield Finding("worker", "note", f"{', '.join(missing)} not installed: this machine can run no worker", remedy)
    else:
        yield from _check_device()
    yield _check_memory()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _check_device() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        yield Finding("device", "good", f"{name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free")
        return
    from sequoia.engine.native.library import vectors, why_unavailable

    problem = why_unavailable()
    cores = f"{num_cores()} cores, no GPU"
    if not problem:
        yield Finding("device", "good", f"{cores}; the C engine runs here, with {vectors()}")
        return
    remedy = "install a C compiler (gcc)" if "compiler" in problem else "it works, an x86 CPU with AVX2 is faster"
    yield Finding("device", "note", f"{cores}; the C engine does not run here: {problem}", remedy)


def _check_memory() -> Finding:
    free = available_bytes()
    if free is None:
        return Finding("memory", "note", "how much is free cannot be told on this machine")
    if free < _LITTLE_BYTES:
        remedy = "free some; a target that does not fit is streamed with `sequoia up --offload disk`"
        return Finding("memory", "note", f"{free / _GIB:.1f} GiB are free", remedy)
    plots = "" if find_spec("matplotlib") else "; pictures need pip install sequoia-serving[bench]"
    return Finding("memory", "good", f"{free / _GIB:.1f} GiB are free{plots}")
