"""A draft that knows some of its target's tokens: the whole model's numbers where it knows them, nothing elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from engines import load_engine, needs_native
from safetensors.torch import save_file
from tiny_models import write_narrow_model, write_tiny_model

from sequoia.engine.attention import chunk_segment
from sequoia.engine.draft_vocabulary import FILE
from sequoia.engine.forwards import Engine
from sequoia.engine.model import load_model
from sequoia.engine.sources import resolve
from sequoia.errors import InvalidArgument

KNOWN = torch.tensor([0, 1, *range(30, 200), *range(250, 337)])
PROMPT = (31, 33, 260, 0, 199, 50)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the draft that is all of it but proposes fewer tokens."""
    whole, narrow = (tmp_path_factory.mktemp(name) for name in ("whole", "narrow"))
    write_tiny_model(whole, "llama", num_layers=2)
    write_narrow_model(whole, narrow, KNOWN.tolist())
    return whole, narrow


def logits_of(engine: Engine, prompt: tuple[int, ...]) -> torch.Tensor:
    with engine.cache.slot() as slot:
        return engine.forward([chunk_segment(slot, prompt, logits=True)])[0]


@pytest.mark.parametrize(
    ("engine", "dtype", "tolerance"),
    [
        ("transformers", "float32", 1e-5),
        ("lean", "float32", 1e-5),
        ("graphs", "float32", 1e-5),
        pytest.param("native", "bfloat16", 1e-5, marks=needs_native),
    ],
)
@pytest.mark.parametrize("prompt", [PROMPT, (31, 220, 33)], ids=["known", "with one that it never proposes"])
def test_known_tokens_have_the_logits_of_the_whole_model(folders, engine, dtype, tolerance, prompt) -> None:
    theirs, ours = (logits_of(load_engine(folder, engine=engine, dtype=dtype), prompt) for folder in folders)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours[:, KNOWN], theirs[:, KNOWN], rtol=tolerance, atol=tolerance)


def test_unknown_tokens_are_never_proposed(folders) -> None:
    unknown = [token for token in range(400) if token not in KNOWN]
    assert (logits_of(load_engine(folders[1], engine="lean", dtype="float32"), PROMPT)[:, unknown] == -torch.inf).all()


@pytest.mark.parametrize("token_ids", [[], [5, 5, 6], [6, 5], [-1, 4], [7, 400], [*range(400)]])
def test_a_vocabulary_that_does_not_fit_its_model_is_refused(folders, tmp_path, token_ids) -> None:
    shutil.copytree(folders[1], tmp_path, dirs_exist_ok=True)
    save_file({"token_ids": torch.tensor(token_ids, dtype=torch.int64)}, tmp_path / FILE)
    with pytest.raises(InvalidArgument, match="does not fit its model") as raised:
        load_model(resolve(str(tmp_path)), dtype="float32", device="cpu")
    assert raised.value.field == "model"


def test_a_vocabulary_that_cannot_be_read_is_refused(folders, tmp_path) -> None:
    shutil.copytree(folders[1], tmp_path, dirs_exist_ok=True)
    (tmp_path / FILE).write_bytes(b"not safetensors")
    with pytest.raises(InvalidArgument, match="cannot be read") as raised:
        load_model(resolve(str(tmp_path)), dtype="float32", device="cpu")
    assert raised.value.field == "model"
