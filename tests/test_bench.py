"""`sequoia bench`: what the rules accept of known distributions, tiny models from text to plot, a running system."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import System
from tiny_models import write_tiny_model, write_tiny_pair
from torch import Tensor

from sequoia.cli import bench, main
from sequoia.cli.benchmarks.robustness import TEMPERATURES
from sequoia.cli.robustness import RULES, Acceptance, LogitPair, load_pair, measure, pair_logits, write_texts
from sequoia.cli.rule_timing import Workload
from sequoia.cli.rule_timing import measure as measure_timing
from sequoia.errors import FailedPrecondition
from sequoia.rules import SAMPLED_RULES
from sequoia.topology import Topology


def noisy_pair(num_positions: int, vocab_size: int) -> LogitPair:
    """A target, and a draft that is often right; a vocabulary below the width at which q is cut."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(num_positions, vocab_size, generator=generator) * 3
    return LogitPair(target, target + torch.randn(target.shape, generator=generator) * 1.5)


def by_rule(logits: LogitPair, temperature: float, num_children: int = 4) -> dict[str, Acceptance]:
    return {each.rule: each for each in measure(logits, [temperature], num_children, lambda done, total: None)}


def softmax(logits: Tensor, temperature: float) -> np.ndarray:
    powers = np.exp(logits.numpy().astype(np.float64) / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_naive_top_k_accepts_the_targets_mass_on_the_drafts_likeliest_tokens(temperature: float) -> None:
    logits = noisy_pair(20, 50)
    likeliest = np.argsort(-logits.draft.numpy(), axis=1)[:, :4]
    masses = np.take_along_axis(softmax(logits.target, temperature), likeliest, axis=1)
    found = by_rule(logits, temperature)["naive top-k"]
    assert found.by_rank == pytest.approx(masses.mean(axis=0))
    assert found.standard_error == pytest.approx(masses.sum(axis=1).std() / 20**0.5)


def test_the_first_drawn_child_is_accepted_as_often_as_the_distributions_overlap() -> None:
    logits = noisy_pair(60, 24)
    overlap = np.minimum(softmax(logits.target, 0.8), softmax(logits.draft, 0.8)).sum(axis=1).mean()
    found = by_rule(logits, 0.8)
    # 960 draws: four standard errors are at most 0.07.
    assert [found[rule].by_rank[0] for rule in ("sequoia", "specinfer")] == pytest.approx([overlap] * 2, abs=0.07)
    assert found["sequoia"].total > found["specinfer"].total, "no token is drawn twice"


def test_a_draft_that_is_the_target_is_accepted_at_rank_0() -> None:
    target = noisy_pair(50, 24).target
    found = by_rule(LogitPair(target, target), 0.8)
    assert found["sequoia"].by_rank[0] > 0.99
    assert found["coupled"].by_rank == (1.0, 0.0, 0.0, 0.0)
    assert found["coupled"].tokens_per_step == 16.0, "a chain of 16 nodes, all accepted"


def test_near_temperature_0_the_rules_agree() -> None:
    logits = noisy_pair(50, 24)
    agreement = float((logits.target.argmax(1) == logits.draft.argmax(1)).double().mean())
    assert 0.2 < agreement < 0.9
    found = by_rule(logits, 1e-4)
    assert [each.by_rank[0] for each in found.values()] == pytest.approx([agreement] * len(RULES), abs=0.01)
    distinct = [found[rule].total for rule in ("sequoia", "coupled", "naive top-k")]
    assert distinct == pytest.approx([distinct[-1]] * 3, abs=0.01)
    assert found["specinfer"].total < distinct[-1] - 0.1, "its children are one and the same token"


@pytest.fixture(scope="module")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    models = write_tiny_pair(tmp_path_factory.mktemp("pair"))
    return str(models["verify"]), str(models["draft"])


def test_logits_are_those_each_written_token_was_drawn_from(tiny_pair: tuple[str, str]) -> None:
    pair = load_pair(*tiny_pair, draft_quantization="none", dtype="float32")
    texts = write_texts(pair.target, ("The sky is", "A tree has"), 20)
    found = pair_logits(pair, texts, 15)
    first, last = texts[0].token_ids[:, : texts[0].num_prompt_tokens], texts[0].token_ids[:, :-1]
    num_written = texts[0].token_ids.shape[1] - texts[0].num_prompt_tokens
    assert found.target.shape == found.draft.shape == (15, 400)
    for model, logits in zip(pair, found, strict=True):
        torch.testing.assert_close(logits[0], model.module(first).logits[0, -1], atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[num_written - 1], model.module(last).logits[0, -1], atol=1e-4, rtol=0)


def test_models_with_other_tokens_are_refused(tiny_pair: tuple[str, str], tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "other", "llama", vocab_size=300)
    with pytest.raises(FailedPrecondition, match="has another tokenizer"):
        load_pair(tiny_pair[0], str(tmp_path / "other"), draft_quantization="none", dtype="float32")


def bench_robustness(tiny_pair: tuple[str, str], *arguments: str) -> int:
    target, draft = tiny_pair
    return main(["bench", "robustness", "--target", target, "--draft", draft, "--positions", "12", *arguments])


def test_robustness_prints_one_json_object_and_draws_the_plot(
    tiny_pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_robustness(tiny_pair, "--draft-quantization", "int8", "--json", "--plot", f"{tmp_path}/a.svg") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["draft"]["quantization"] == "int8"
    cells = {(each["temperature"], each["rule"]) for each in printed["results"]}
    assert cells == {(temperature, rule) for temperature in TEMPERATURES for rule in RULES}
    assert all(1.0 <= each["tokens_per_step"] <= 16.0 for each in printed["results"])
    assert all(len(each["by_rank"]) == 5 for each in printed["results"])
    assert "</svg>" in (tmp_path / "a.svg").read_text()


def test_robustness_prints_a_row_a_temperature(
    tiny_pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_robustness(tiny_pair, "--children", "2", "--plot", f"{tmp_path}/a.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "% / " in line] == [f"{each:g}" for each in TEMPERATURES]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "robustness", "--target", "none", "--draft", "none", "--plot", "a.svg"]) == 2
    assert capsys.readouterr().err == "error: --plot: needs matplotlib: pip install sequoia-serving[bench]\n"


def test_help_names_every_benchmark_and_loads_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for benchmark in bench.BENCHMARKS.values():
        monkeypatch.setitem(sys.modules, benchmark.module, None)
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["bench", "--help"])
    assert set(bench.BENCHMARKS) <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["robustness", "--target", "a", "--draft", "b", "--plot", "a.pdf"], "--plot"),
        (["robustness", "--target", "a", "--draft", "b", "--positions", "0"], "positions"),
        (["rules", "--rounds", "0"], "rounds"),
        (["rules", "--max-tokens", "1"], "max-tokens"),
        (["rules", "--temperature", "0"], "temperature"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {field}: ")


def test_rules_on_a_running_system(tiny_system: System, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rounds", "1", "--max-tokens", "16", "--temperature", "0.7", "--json"]
    assert main(["bench", "rules", "--address", tiny_system.deployment.address, *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    off, *sampled = printed["results"]
    assert (off["rule"], off["tokens_per_step"], off["acceptance_at_rank_0"]) == ("off", 1.0, None)
    assert off["ratio_to_off"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    assert [each["rule"] for each in sampled] == [each.name for each in SAMPLED_RULES]
    assert all(each["num_answers"] == 6 and each["seconds_per_token"] > 0.0 for each in sampled)
    assert all(1.0 < each["tokens_per_step"] <= 6.0 and 0.1 < each["acceptance_at_rank_0"] < 1.0 for each in sampled)


def test_rules_prints_a_row_a_rule(tiny_system: System, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rounds", "1", "--max-tokens", "4", "--rule", "coupled", "--tree", "-1,0,0"]
    assert main(["bench", "rules", "--address", tiny_system.deployment.address, *arguments]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if " (" in line and "range" not in line]
    assert rows == [["0.6", "off"], ["0.6", "coupled"], ["1", "off"], ["1", "coupled"]]


class RecordingClient:
    """Answers at once; plain answers take 1, 2, 3 ... seconds a token, those by a rule half as long."""

    def __init__(self) -> None:
        self.modes: list[str] = []

    def generate(self, prompt: str, *, rule: str | None, **options: Any) -> SimpleNamespace:
        self.modes.append(rule or "off")
        seconds = self.modes.count(self.modes[-1]) * (0.5 if rule else 1.0)
        figures = SimpleNamespace(num_steps=4, num_accepted_tokens=6, offered_by_rank=(), accepted_by_rank=())
        return SimpleNamespace(usage=SimpleNamespace(time_per_output_token_seconds=seconds), speculation=figures)


def test_every_mode_takes_every_place_and_is_compared_with_its_own_neighbour() -> None:
    client = RecordingClient()
    workload = Workload(("a", "b", "c"), ("sequoia", "coupled"), Topology.chain(2), num_rounds=2, max_tokens=8)
    found = measure_timing(client, [1.0], workload, lambda done, total: None)
    turns = np.array(client.modes[3:]).reshape(6, 3)
    assert [sorted(turn) for turn in turns] == [["coupled", "off", "sequoia"]] * 6
    assert [sorted(set(place)) for place in turns.T] == [["coupled", "off", "sequoia"]] * 3
    assert [each.ratios_to_off for each in found[1:]] == [(2.0,) * 6] * 2
    assert found[1].tokens_per_step == 2.5
