"""Packed drafts: what they keep of a dense model, and that they are found, loaded and refused like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model

from sequoia.engine.distillation.student import make_student
from sequoia.engine.draft_vocabulary import DraftVocabulary, narrow_head
from sequoia.engine.model import load_model
from sequoia.engine.packed import FILE, pack
from sequoia.engine.sources import resolve
from sequoia.errors import InvalidArgument


@pytest.fixture
def target(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "target", "llama")
    return tmp_path / "target"


@pytest.fixture
def draft(target: Path, tmp_path: Path) -> Path:
    """Of the target's shape, with no weight of the target's."""
    shutil.copytree(target, tmp_path / "draft")
    path, generator = tmp_path / "draft" / "model.safetensors", torch.Generator().manual_seed(1)
    factors = {name: 0.9 + 0.2 * torch.rand(each.shape, generator=generator) for name, each in load_file(path).items()}
    save_file({name: each * factors[name] for name, each in load_file(path).items()}, path, {"format": "pt"})
    return tmp_path / "draft"


@pytest.fixture
def packed(target: Path, draft: Path, tmp_path: Path) -> Path:
    return packed_copy(draft, target, tmp_path / "packed")


def packed_copy(draft: Path, target: Path, into: Path) -> Path:
    shutil.copytree(draft, into)
    pack(into, str(target), target)
    return into


def load(folder: Path, cache: Path, dtype: str = "float32"):
    return load_model(resolve(str(folder), cache_dir=cache), dtype=dtype, device="cpu")


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_a_packed_model_is_a_fifth_of_float32_and_holds_no_tokenizer(draft: Path, packed: Path) -> None:
    assert num_bytes(packed) < 0.23 * num_bytes(draft)
    assert not list(packed.glob("tokenizer*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_model_but_for_half_a_step_of_each_group(target, draft, packed, tmp_path, dtype: str) -> None:
    ours = load(packed, tmp_path / "cache", dtype)
    assert ours.tokenizer.tokenizer_hash == load(target, tmp_path / "cache").tokenizer.tokenizer_hash
    original = load(draft, tmp_path / "cache").module.state_dict()
    found = {name: weight.float() for name, weight in ours.module.state_dict().items()}
    for name, weight in found.items():
        largest = original[name].abs().amax(-1, keepdim=True)
        assert bool(((weight - original[name]).abs() <= largest * (0.51 / 31 + (dtype == "bfloat16") / 256)).all())
    assert any(not torch.equal(weight, original[name]) for name, weight in found.items())


def test_packing_again_what_was_unpacked_changes_nothing(target: Path, packed: Path, tmp_path: Path) -> None:
    load(packed, tmp_path / "cache").module.save_pretrained(tmp_path / "again")
    pack(tmp_path / "again", str(target), target)
    first, second = (load_file(folder / FILE) for folder in (packed, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("trained", [(), ("lm_head.weight",), ("model.layers.1.mlp.up_proj.weight",)])
def test_what_is_the_targets_is_not_stored(target: Path, tmp_path: Path, trained: tuple[str, ...]) -> None:
    known = torch.arange(0, 300, 3)
    theirs = load(target, tmp_path / "cache")
    student = make_student(theirs.module, (0, 1), None)
    for name in trained:
        weight = student.get_parameter(name).data
        weight[known if name.startswith("lm_head") else slice(None)] *= 1.125
    student.save_pretrained(tmp_path / "few")
    DraftVocabulary(known, theirs.padded_vocab_size).save(tmp_path / "few")
    packed = packed_copy(tmp_path / "few", target, tmp_path / "packed")
    stored = {name: each for name, each in load_file(packed / FILE).items() if not name.endswith(".scales")}
    assert tuple(stored) == trained
    assert all(len(each) == len(known) for name, each in stored.items() if name.startswith("lm_head"))
    found = load(packed, tmp_path / "cache")
    assert found.vocabulary is not None
    assert torch.equal(found.vocabulary.token_ids, known)
    narrow_head(student, known)
    for name, weight in student.state_dict().items():
        step = 0.51 / 31 * float(weight.abs().max()) if name in trained else 0.0
        torch.testing.assert_close(found.module.get_parameter(name), weight, rtol=0.0, atol=step)


def test_what_is_damaged_or_without_its_target_is_refused(packed: Path, target: Path, tmp_path: Path) -> None:
    shutil.rmtree(target)
    with pytest.raises(InvalidArgument, match="no model") as caught:
        load(packed, tmp_path / "cache")
    assert caught.value.field == "model"
    write_tiny_model(target, "llama", num_layers=1)
    ours = load_file(packed / FILE)
    shared = {name: name for name in ours if not name.endswith(".scales")}
    save_file({}, packed / FILE, {"target": str(target), "shared": json.dumps(shared), "bits": "6"})
    with pytest.raises(InvalidArgument, match="is no draft of"):
        load(packed, tmp_path / "cache")
    save_file({}, packed / FILE, {"target": str(target), "shared": "{", "bits": "6"})
    with pytest.raises(InvalidArgument, match="or damaged: JSONDecodeError"):
        load(packed, tmp_path / "cache")
    save_file({}, packed / FILE, {"target": str(packed), "shared": "{}", "bits": "6"})
    with pytest.raises(InvalidArgument, match="which refers to another"):
        load(packed, tmp_path / "cache")
    (packed / FILE).write_bytes(b"nothing")
    with pytest.raises(InvalidArgument, match=r"packed\.safetensors cannot be read") as caught:
        load(packed, tmp_path / "cache")
    assert caught.value.field == "model"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name.startswith(".partial")]
