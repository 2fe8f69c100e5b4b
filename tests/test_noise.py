"""The noise: the same bits everywhere, inside the open interval, and a fair race. All seeds are fixed."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import reference
import torch

from sequoia.engine import noise
from sequoia.engine.children import coupled_children
from sequoia.engine.noise import gumbel_noise, gumbel_rows, noise_bits, streams, uniform_noise
from sequoia.engine.sampling import coupled_token
from sequoia.sampling import Sampling

NODE_CASES = json.loads((Path(__file__).parent / "data" / "acceptance_cases.json").read_text())["vectors"]
COUPLED_CASES = [case for case in NODE_CASES if case["rule"] == "gumbel_coupled"]
SEEDS = (0, 1, 1234567, 2**63, 2**64 - 1)


def test_the_reference_is_split_mix_as_published() -> None:
    """The first outputs for seed 1234567, as other implementations list them."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert reference.split_mix(1234567, 4) == published


@pytest.mark.parametrize("seed", SEEDS)
def test_bits_are_those_of_the_reference(seed: int) -> None:
    for position in (0, 1, 77):
        stream = reference.split_mix(seed, position + 1)[-1]
        found = noise_bits(seed, position, torch.arange(50)).tolist()
        assert [bits & reference.MASK for bits in found] == reference.split_mix(stream, 50)


def test_a_token_has_its_noise_whatever_tokens_are_asked_for_beside_it() -> None:
    whole = noise_bits(5, 9, torch.arange(1000))
    some = torch.tensor([[3, 999], [500, 3]])
    assert torch.equal(noise_bits(5, 9, some), whole[some])


def test_many_positions_at_once_have_the_noise_of_each() -> None:
    ids, positions = torch.arange(300), (0, 5, 2, 5)
    rows = gumbel_rows(torch.from_numpy(streams(11, positions))[:, None], ids)
    assert torch.equal(rows, torch.stack([gumbel_noise(11, position, ids) for position in positions]))


def test_another_process_has_the_same_noise() -> None:
    program = (
        "import torch; from sequoia.engine.noise import gumbel_noise;"
        "print(gumbel_noise(2**64 - 1, 12345, torch.arange(64)).view(torch.int64).tolist())"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(found) == gumbel_noise(2**64 - 1, 12345, torch.arange(64)).view(torch.int64).tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_the_same_bits() -> None:
    ids = torch.arange(152_064)
    assert torch.equal(noise_bits(3, 4, ids.cuda()).cpu(), noise_bits(3, 4, ids))


def test_the_interval_is_open_for_the_least_and_the_largest_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "noise_bits", lambda seed, position, ids: torch.tensor([0, -1]))
    least, largest = uniform_noise(0, 0, torch.arange(2)).tolist()
    assert 0.0 < least < 2.0**-52
    assert 1.0 - 2.0**-52 < largest < 1.0
    assert bool(gumbel_noise(0, 0, torch.arange(2)).isfinite().all())


def test_seeds_and_positions_give_noise_of_their_own() -> None:
    ids = torch.arange(2000)
    drawn = [noise_bits(seed, position, ids) for seed in (0, 1, 2**32, 2**63) for position in range(25)]
    assert len(torch.cat(drawn).unique()) == 100 * 2000


def test_noise_is_uniform_over_tokens_and_over_positions() -> None:
    """Chi-square of 1,000,000 numbers in 1,000 bins, 999 degrees of freedom: above 1170 once in 10,000."""
    along_tokens = uniform_noise(11, 3, torch.arange(1_000_000)).numpy()
    along_positions = np.concatenate(
        [uniform_noise(11, position, torch.arange(100)).numpy() for position in range(10_000)]
    )
    for numbers in (along_tokens, along_positions):
        counts = np.histogram(numbers, bins=1000, range=(0.0, 1.0))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 1170


def test_noise_of_neighbouring_positions_and_seeds_is_uncorrelated() -> None:
    """Correlation of 200,000 pairs has a standard deviation of 0.00224; 5 of them: false alarm below 1e-6 each."""
    ids = torch.arange(200_000)
    first = uniform_noise(7, 100, ids).numpy()
    for seed, position in ((7, 101), (8, 100), (7, 99), (6, 101)):
        assert abs(np.corrcoef(first, uniform_noise(seed, position, ids).numpy())[0, 1]) < 5 * 0.00224
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 * 0.00224


@pytest.mark.parametrize(
    "sampling", [Sampling(seed=3), Sampling(0.5, top_k=4, seed=3), Sampling(1.5, 0.8, seed=3)], ids=str
)
def test_the_race_draws_from_p(sampling: Sampling) -> None:
    """Chi-square of 20,000 positions over at most 6 tokens, 5 degrees of freedom: above 25.7 once in 10,000."""
    logits = [2.0, 1.0, 0.5, 0.0, -1.0, -1.5]
    p, positions = reference.probabilities(logits, sampling), 20_000
    row = torch.tensor(logits, dtype=torch.float64)
    counts = np.bincount([coupled_token(row, sampling, position) for position in range(positions)], minlength=6)
    expected = positions * np.array(p)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum() < 25.7


@pytest.mark.parametrize("case", COUPLED_CASES, ids=lambda case: f"{case['case']}-{case['k']}")
def test_one_node_accepts_as_computed_elsewhere(case: dict) -> None:
    """4,000 positions; 5 standard deviations: false alarm below 1e-6 per rank, 60 ranks."""
    p, q = (np.array([float(Fraction(x)) for x in case[name]]) for name in ("p", "q"))
    with np.errstate(divide="ignore"):
        target, draft = torch.tensor(np.log(p)), torch.tensor(np.log(q))[None]
    positions, accepted = 4000, np.zeros(case["k"])
    for position in range(positions):
        sampling = Sampling(seed=17)
        [children] = coupled_children(draft, sampling, position, [case["k"]])
        token = coupled_token(target, sampling, position)
        if token in children:
            accepted[children.index(token)] += 1
    for found, expected in zip(accepted / positions, case["accept_float"], strict=True):
        assert abs(found - expected) <= 5 * (expected * (1 - expected) / positions) ** 0.5 + 1e-12
