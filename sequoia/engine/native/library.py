"""The C library: compiled once for this CPU with the machine's own compiler, kept in the user's cache, and loaded."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

from sequoia.config import cpu_flags
from sequoia.errors import SequoiaError

_FOLDER = Path(__file__).parent
_FILES = tuple(sorted((*_FOLDER.glob("*.c"), *_FOLDER.glob("*.h"))))
# What the code is written for: products of bfloat16 and of int8, and the conversions around them.
_AVX512_FLAGS = frozenset(("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"))
# What it makes do with (avx2.h), on a CPU that lacks some of these.
_NEEDED_FLAGS = frozenset(("avx2", "fma"))
# No contraction: a product and a sum are fused where the source says so, in every tile alike.
_OPTIONS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared")
_AVX2_OPTIONS = ("-mno-avx512f",)
_COMPILE_SECONDS = 300


class NativeUnavailable(SequoiaError):
    """This machine cannot run the C engine; the message says why."""


@functools.cache
def library(cache_dir: Path) -> ctypes.CDLL:
    """The loaded library. Raises NativeUnavailable where the CPU or a C compiler is missing.

    torch must be imported before: the library runs on the OpenMP pool that torch has loaded, or two pools would fight
    for the same cores.
    """
    if problem := why_unavailable():
        raise NativeUnavailable(problem)
    built = _built(cache_dir / "native")
    try:
        loaded = ctypes.CDLL(str(built))
    except OSError as error:
        raise NativeUnavailable(f"{built} cannot be loaded: {error}") from error
    loaded.sequoia_use_amx(1)
    return loaded


def why_unavailable() -> str:
    """What this machine lacks; empty if nothing."""
    if missing := sorted(_NEEDED_FLAGS - cpu_flags()):
        return f"the CPU lacks {', '.join(missing)}"
    return "" if _compiler() else "there is no C compiler (cc, gcc or clang)"


def vectors() -> str:
    """What it computes with on this CPU, if it runs here."""
    if not cpu_flags() >= _AVX512_FLAGS:
        return "AVX2"
    return "AMX" if "amx_bf16" in cpu_flags() else "AVX-512"


def _options() -> tuple[str, ...]:
    return _OPTIONS if cpu_flags() >= _AVX512_FLAGS else _OPTIONS + _AVX2_OPTIONS


def _compiler() -> str:
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")


def _built(folder: Path) -> Path:
    compiler = _compiler()
    recipe = f"{_version(compiler)} {_options()} {sorted(cpu_flags())}".encode()
    recipe += b"".join(path.read_bytes() for path in _FILES)
    target = folder / f"decoder-{hashlib.sha256(recipe).hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "build.lock"):
        if not target.exists():
            _compile(compiler, target)
    return target


def _compile(compiler: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        output = Path(folder) / target.name
        _run([compiler, *_options(), *(str(path) for path in _FILES if path.suffix == ".c"), "-o", str(output), "-lm"])
        output.replace(target)


def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise NativeUnavailable(f"{command[0]} does not compile the engine: {done.stderr.strip()[-500:]}")
    return done.stdout
