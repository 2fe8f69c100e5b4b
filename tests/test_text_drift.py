"""`sequoia bench drift`: divergences that are known, texts of tiny models, a rounded target against what it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny_model
from transformers import AutoModelForCausalLM

from sequoia.cli import main
from sequoia.cli.subject import Subject, load
from sequoia.cli.text_drift import Drift, GreedyText, TextDrift, compare, text_drift, write
from sequoia.engine.native.library import NativeUnavailable, library
from sequoia.engine.sources import default_cache_dir
from sequoia.errors import InvalidArgument

PROMPTS = (tuple(range(30, 60)), tuple(range(100, 117)))


def why_not() -> str:
    try:
        library(default_cache_dir())
    except NativeUnavailable as error:
        return str(error)
    return ""


needs_native = pytest.mark.skipif(bool(why_not()), reason=f"no native engine here: {why_not()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drift") / "target"
    write_tiny_model(folder, "llama")
    return folder


def written(subject: Subject, num_tokens: int = 40) -> list[GreedyText]:
    return write(subject, PROMPTS, num_tokens, lambda done, total: None)


def compared(subject: Subject, texts: list[GreedyText]) -> Drift:
    return compare(subject, "int8", texts, lambda done, total: None)


def logs(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log().float()


def test_the_divergence_is_from_the_target_to_the_rounded_one_and_a_token_that_is_never_said_adds_nothing() -> None:
    text = GreedyText((5,), (0, 1), logs((0.5, 0.5, 0.0), (0.25, 0.5, 0.25)))
    found = text_drift(text, logs((0.25, 0.5, 0.25), (0.25, 0.5, 0.25)))
    assert found.divergences == pytest.approx((0.5 * math.log(2), 0.0), abs=1e-7)
    assert found.are_equal == (False, True)


def test_a_text_is_the_same_up_to_its_first_difference_or_its_end() -> None:
    same, other = TextDrift((True, True), (0.0, 0.0)), TextDrift((True, True, False, True), (0.5, 0.0, 2.0, 0.0))
    found = Drift("int8", (same, other))
    assert (same.first_difference, other.first_difference) == (None, 2)
    assert [found.num_equal_texts(length) for length in (1, 2, 3, 9)] == [2, 2, 1, 1]
    assert (found.num_positions, found.argmax_share) == (6, 5 / 6)
    assert found.mean_divergence == pytest.approx(2.5 / 6)


def test_texts_are_those_of_transformers_and_a_target_does_not_drift_from_itself(folder: Path) -> None:
    subject = load(str(folder), dtype="float32", context_length=256)
    texts = written(subject)
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        expected = module.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :]
        assert text.token_ids == tuple(expected.tolist())
    found = compared(subject, texts)
    assert (found.argmax_share, found.num_equal_texts(40)) == (1.0, 2)
    assert max(map(abs, found.divergences)) < 1e-6


def test_a_text_that_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="tokens: a prompt and its text take 70 tokens; the context has 64"):
        written(load(str(folder), dtype="float32", context_length=64))


@needs_native
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_first_difference_is_where_the_rounded_target_writes_something_else(
    folder: Path, quantization: str
) -> None:
    texts = written(load(str(folder), dtype="bfloat16", context_length=256))
    rounded = load(str(folder), dtype="bfloat16", quantization=quantization, context_length=256)
    for text, other, found in zip(texts, written(rounded), compared(rounded, texts).texts, strict=True):
        pairs = enumerate(zip(text.token_ids, other.token_ids, strict=False))
        assert found.first_difference == next((at for at, (ours, theirs) in pairs if ours != theirs), None)


@needs_native
def test_coarser_rounding_moves_the_text_further(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "drift", "--target", str(folder), "--prompts", "1", "--tokens", "12", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    int8, int4 = printed["results"]
    assert (int8["quantization"], int4["quantization"], int8["num_texts"]) == ("int8", "int4", 5)
    assert 0.0 < int8["mean_divergence"] < int4["mean_divergence"] <= int4["largest_divergence"]
    assert 0.0 < int4["argmax_share"] <= int8["argmax_share"] <= 1.0
    assert len(int4["first_differences"]) == 5
    assert (printed["dtype"], printed["engine"]) == ("bfloat16", "native")


@needs_native
def test_a_row_a_quantisation_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompts", "1", "--tokens", "10", "--quantization", "int4", "--raw"]
    assert main(["bench", "drift", "--target", str(folder), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    [header] = [line for line in lines if "same argmax" in line]
    assert header.rstrip().endswith("first 10")
    assert [line.split()[0] for line in lines if " of 5" in line] == ["int4"]


@pytest.mark.parametrize(("flag", "field"), [("--tokens", "tokens"), ("--prompts", "prompts")])
def test_a_wrong_argument_is_named_before_a_model_is_loaded(
    flag: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "drift", "--target", "nowhere", flag, "0"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {field}: ")
