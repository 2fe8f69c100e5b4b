"""Captured work: on the CPU the work itself; on a CUDA device the same results from a replay (skipped without one)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import load_engine
from pretend_device import PretendDevice
from test_graphs_decoder import some_logits
from test_synchronisation import DECODINGS, WARM, Steps
from tiny_models import write_tiny_model

from sequoia.engine.graphs import Graphs
from sequoia.rules import COUPLED
from sequoia.sampling import Decoding

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def assert_follows_its_inputs(device: torch.device) -> None:
    numbers = torch.arange(4.0, device=device)
    graphs = Graphs(device)
    doubled, squared = (graphs.capture(work) for work in (lambda: numbers * 2, lambda: numbers.square()))
    for start in (0.0, 3.0, -7.0):
        numbers.copy_(torch.arange(start, start + 4, device=device))
        expected = torch.arange(start, start + 4)
        assert doubled().cpu().tolist() == (expected * 2).tolist()
        assert squared().cpu().tolist() == expected.square().tolist()


def test_captured_work_follows_what_is_put_into_its_inputs() -> None:
    assert_follows_its_inputs(torch.device("cpu"))


@needs_cuda
def test_a_graph_follows_what_is_put_into_its_inputs() -> None:
    assert_follows_its_inputs(torch.device("cuda"))


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_tiny_model(path, request.param)
    return path


@needs_cuda
def test_replayed_forwards_give_the_logits_of_the_cpu(folder: Path) -> None:
    engine = load_engine(folder, device="cuda")
    expected = some_logits(load_engine(folder, engine="lean"))
    for _ in range(2):  # captured in the first round
        for ours, theirs in zip(some_logits(engine), expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0.0, atol=1e-3)


@needs_cuda
@pytest.mark.parametrize("decoding", [DECODINGS["greedy"], Decoding(COUPLED, replace(WARM, seed=7), 1)], ids=str)
def test_trees_and_verdicts_of_a_gpu_are_those_of_the_cpu(folder: Path, decoding: Decoding) -> None:
    found = []
    with torch.inference_mode():
        for device in ("cuda", "cpu"):
            engine = load_engine(folder, device=device)
            found.append(list(Steps(engine, PretendDevice(), decoding).texts(6)))
    for (tree, verdict), (near_tree, near_verdict) in zip(*found, strict=True):
        assert (tree.topology, tree.token_ids, verdict) == (near_tree.topology, near_tree.token_ids, near_verdict)


@needs_cuda
def test_a_gpu_is_not_waited_for_within_a_forward(folder: Path) -> None:
    engine = load_engine(folder, device="cuda")
    with torch.inference_mode():
        steps = Steps(engine, PretendDevice(), DECODINGS["greedy"])
        texts = steps.texts(4)
        for _ in range(3):  # whatever is captured is captured now
            next(texts)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchronizing") as caught:
                next(texts)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in caught if "synchronizing" in str(each.message)]) == 2  # a draft step and a verify step
