"""Packed drafts: what they keep of a dense model, and that they are found, loaded and refused like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_tiny_model

from sequoia.engine.draft_vocabulary import DraftVocabulary
from sequoia.engine.model import load_model
from sequoia.engine.packed import FILE, pack
from sequoia.engine.sources import PACKAGED, PACKAGED_DRAFTS, packaged_draft, resolve
from sequoia.errors import InvalidArgument


@pytest.fixture
def target(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "target", "llama")
    return tmp_path / "target"


@pytest.fixture
def packed(target: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "packed"
    shutil.copytree(target, folder)
    pack(folder, str(target))
    return folder


def load(folder: Path, cache: Path, dtype: str = "float32"):
    return load_model(resolve(str(folder), cache_dir=cache), dtype=dtype, device="cpu")


def test_a_packed_model_is_a_quarter_and_holds_no_tokenizer(target: Path, packed: Path) -> None:
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (target, packed)]
    assert sizes[1] < 0.3 * sizes[0]
    assert not list(packed.glob("tokenizer*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_model_but_for_half_a_step_of_each_group(target, packed, tmp_path, dtype: str) -> None:
    ours, theirs = (load(folder, tmp_path / "cache", dtype) for folder in (packed, target))
    assert ours.tokenizer.tokenizer_hash == theirs.tokenizer.tokenizer_hash
    original = theirs.module.state_dict()
    for name, weight in ours.module.state_dict().items():
        largest = original[name].abs().amax(-1, keepdim=True)
        assert bool(((weight - original[name]).abs() <= largest * (0.51 / 127 + (dtype == "bfloat16") / 256)).all())
    assert any(not torch.equal(weight, original[name]) for name, weight in ours.module.state_dict().items())


def test_packing_again_what_was_unpacked_changes_nothing(packed: Path, tmp_path: Path) -> None:
    dense = load(packed, tmp_path / "cache").module
    dense.save_pretrained(tmp_path / "again")
    pack(tmp_path / "again", "any")
    first, second = (load_file(folder / FILE) for folder in (packed, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_draft_of_few_tokens_keeps_them(target: Path, tmp_path: Path) -> None:
    folder, known = tmp_path / "few", torch.arange(0, 300, 3)
    model = load(target, tmp_path / "cache")
    shutil.copytree(target, folder)
    model.module.resize_token_embeddings(len(known) + 1)
    model.module.save_pretrained(folder)
    DraftVocabulary(known, model.padded_vocab_size).save(folder)
    pack(folder, str(target))
    found = load(folder, tmp_path / "cache")
    assert found.vocabulary is not None
    assert torch.equal(found.vocabulary.token_ids, known)


def test_what_is_damaged_or_without_its_target_is_refused(packed: Path, target: Path, tmp_path: Path) -> None:
    shutil.rmtree(target)
    with pytest.raises(InvalidArgument, match="no model") as caught:
        load(packed, tmp_path / "cache")
    assert caught.value.field == "model"
    (packed / FILE).write_bytes(b"nothing")
    with pytest.raises(InvalidArgument, match=r"packed\.safetensors cannot be read") as caught:
        load(packed, tmp_path / "cache")
    assert caught.value.field == "model"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name.startswith(".partial")]


@pytest.mark.parametrize("name", PACKAGED_DRAFTS)
def test_our_own_drafts_are_small_have_a_card_and_fit_their_target(name: str) -> None:
    files = resolve(name)
    assert sum(path.stat().st_size for path in files.directory.iterdir()) <= 16e6
    assert "train-draft" in (files.directory / "README.md").read_text()
    assert PACKAGED_DRAFTS[name] in PACKAGED
    assert packaged_draft(PACKAGED_DRAFTS[name]) == name
    references = (name, PACKAGED_DRAFTS[name])
    draft, target = (load_model(resolve(each), dtype="bfloat16", device="cpu") for each in references)
    assert draft.tokenizer.tokenizer_hash == target.tokenizer.tokenizer_hash


def test_a_model_without_a_draft_of_ours_has_none() -> None:
    assert packaged_draft("org/model") is None
