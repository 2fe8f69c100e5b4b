"""`sequoia bench roofline`: what the command prints of tiny models, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny_model

from sequoia.cli import main
from sequoia.cli.benchmarks.roofline import WIDTHS
from sequoia.engine.attention import Segment
from sequoia.engine.decoders import Arithmetic
from sequoia.engine.roofline import load_subject, measure


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("roofline") / "target"
    write_tiny_model(folder, "gemma3", num_layers=2)
    return str(folder)


def bench_roofline(*arguments: str) -> int:
    return main(["bench", "roofline", "--threads", "1", "--rounds", "1", "--dtype", "float32", *arguments])


def test_one_json_object_holds_both_models_and_every_width(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["--model", target, "--draft", target, "--draft-quantization", "int8"]
    assert bench_roofline(*pair, "--context", "40", "--json", "--plot", f"{tmp_path}/a.svg") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["num_threads"], printed["num_context_tokens"], printed["num_rounds"]) == (1, 40, 1)
    plain, quantized = printed["models"]
    assert plain["linear_parameters"] == quantized["linear_parameters"]
    assert plain["weight_bytes"] == 4 * quantized["weight_bytes"]
    assert (plain["quantization"], quantized["quantization"]) == ("none", "int8")
    for model in printed["models"]:
        assert [each["num_tokens"] for each in model["forwards"]] == list(WIDTHS)
        assert all(each["bound"] in ("memory", "compute") for each in model["forwards"])
        assert all(each["floor_seconds"] > 0.0 < each["ratio"]["median"] for each in model["forwards"])
        assert all(each["seconds"]["low"] <= each["seconds"]["high"] for each in model["forwards"])
        assert 0.0 < model["median_roof"]["bytes_per_second"] <= model["best_roof"]["bytes_per_second"]
        assert 0.0 < model["median_roof"]["flops_per_second"] <= model["best_roof"]["flops_per_second"]
        assert model["compute_bound_from"] >= 1
    assert "</svg>" in (tmp_path / "a.svg").read_text()


def test_a_row_a_width_is_printed(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_roofline("--target", target) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if " to " in line] == [str(n) for n in WIDTHS]


def test_a_sample_a_width_and_round_is_taken_behind_the_context_and_the_first_round_is_not_counted(
    target: str,
) -> None:
    subject = load_subject(target, Arithmetic(num_threads=1), dtype="float32", num_context_tokens=8, max_tokens=4)
    progress: list[tuple[int, int]] = []
    [samples] = measure([subject], (1, 4), 2, lambda *each: progress.append(each))
    assert [each.num_tokens for each in samples] == [1, 4, 1, 4]
    assert progress == [(0, 2), (1, 2), (2, 2)]
    assert subject.engine.num_forward_tokens == 1 + 3 * (1 + 4)
    assert subject.engine.cache.num_slots_used == 0


def test_the_logits_of_every_token_are_computed_as_verifying_needs_them(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = load_subject(target, Arithmetic(num_threads=1), dtype="float32", num_context_tokens=0, max_tokens=4)
    forward = subject.engine.forward
    shapes: list[tuple[int, ...]] = []

    def recording(segments: Sequence[Segment]) -> list[torch.Tensor]:
        logits = forward(segments)
        shapes.append(tuple(logits[0].shape))
        return logits

    monkeypatch.setattr(subject.engine, "forward", recording)
    measure([subject], (4,), 1, lambda done, total: None)
    assert shapes[-1] == (4, subject.model.padded_vocab_size)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--threads", "0"], "threads"),
        (["--rounds", "0"], "rounds"),
        (["--context", "-1"], "context"),
        (["--plot", "a.pdf"], "--plot"),
    ],
)
def test_a_wrong_argument_is_named_before_a_model_is_loaded(
    arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "roofline", "--target", "nowhere", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {field}: ")


def test_a_context_that_leaves_no_room_is_refused(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_roofline("--target", target, "--context", "961") == 2
    assert capsys.readouterr().err.endswith(f"error: context: is 961; with {target} it must be at most 960\n")
