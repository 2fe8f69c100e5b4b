"""What the forward around a row does to its bits, and the mode in which it does nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import ARCHITECTURES, write_tiny_model

from sequoia.cli.seed_stability import NUM_WAYS, Stability, measure
from sequoia.cli.subject import load
from sequoia.sampling import Sampling

PROMPTS = (tuple(range(30, 60)), tuple(range(100, 117)))
NUM_TOKENS = 48


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, request.param)
    return folder


def stability(folder: Path, dtype: str, *, engine: str = "auto", deterministic: bool = False) -> dict[str, Stability]:
    subject = load(str(folder), dtype=dtype, engine=engine, deterministic=deterministic, context_length=256)
    return {each.way: each for each in measure(subject, PROMPTS, Sampling(seed=1), NUM_TOKENS)}


@pytest.mark.parametrize("engine", ["lean", "transformers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_deterministic_mode_every_way_gives_the_same_bits(folder: Path, dtype: str, engine: str) -> None:
    """6 ways x 96 tokens, logits compared bit by bit: trees of three sizes, a batch, a rebuilt session."""
    found = stability(folder, dtype, engine=engine, deterministic=True)
    assert len(found) == NUM_WAYS
    assert {each.max_logit_difference for each in found.values()} == {0.0}
    assert {each.num_flips for each in found.values()} == {0}


def test_without_it_bfloat16_rows_move_with_their_forward_or_the_test_above_proves_nothing(folder: Path) -> None:
    found = stability(folder, "bfloat16", engine="lean")
    assert any(each.max_logit_difference > 0.0 for each in found.values())


def test_float32_tokens_do_not_flip_without_it_either(folder: Path) -> None:
    found = stability(folder, "float32")
    assert max(each.max_logit_difference for each in found.values()) < 1e-3
    assert {each.num_flips for each in found.values()} == {0}
