"""A target in two ranks says what it says in one; a rank that dies ends the worker; what does not fit is refused."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from ranks import Session, one_and_two, rank_pid, under_torchrun
from tiny_models import write_tiny_model
from transformers import GPT2Config, LlamaConfig

from draft_worker.server import DRAFT
from sequoia.cli.process import wait_for_end, wait_until_serving
from sequoia.engine.attention import chunk_segment, tree_segment
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.tensor_parallel.plan import check_plan
from sequoia.engine.tensor_parallel.ranks import join
from sequoia.engine.tensor_parallel.segments import from_numbers, to_numbers
from sequoia.errors import InvalidArgument
from sequoia.topology import TokenTree, Topology
from sequoia.worker import serve
from sequoia.worker_config import WorkerConfig
from verify_worker.server import VERIFY, check_world

# Three tokens longer than whole chunks of the prompt.
PROMPT = random.Random(0).choices(range(2, 390), k=67)
SEEDS = (None, 7)
# What is refused beside ranks, by flag.
WRONG = {"engine": "lean", "quantization": "int8", "offload": "disk", "deterministic": True}


@pytest.fixture(scope="module", params=["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    folder = tmp_path_factory.mktemp(request.param)
    # Neither their vocabulary nor, in Gemma, a head that is the embedding is divided evenly.
    write_tiny_model(
        folder / "model", request.param, vocab_size=395, num_layers=2, tie_word_embeddings=request.param == "gemma3"
    )
    with one_and_two(folder / "model", folder) as addresses:
        yield addresses


@pytest.mark.parametrize("seed", SEEDS, ids=["greedy", "seeded"])
def test_two_ranks_say_what_one_says(pair: tuple[str, str], seed: int | None) -> None:
    alone, ranks = pair
    prompt = [seed or 5, *PROMPT]
    with Session(alone, prompt, seed) as session:
        expected = session.plain(40)
    with Session(ranks, prompt, seed) as session:
        assert session.num_reused_tokens == 0
        assert session.with_trees(expected) == expected
    with Session(ranks, prompt, seed) as session:
        assert session.num_reused_tokens == len(prompt) - 1
        assert session.plain(40) == expected


def test_sessions_that_share_rows_and_forwards_say_what_each_says_alone(pair: tuple[str, str]) -> None:
    alone, ranks = pair
    prompts = [[*PROMPT[:50], number] for number in range(10, 14)]

    def expected(prompt: list[int]) -> list[int]:
        with Session(alone, prompt, prompt[-1]) as session:
            return session.plain(32)

    def said(prompt: list[int]) -> list[int]:
        with Session(ranks, prompt, prompt[-1]) as session:
            assert session.num_reused_tokens >= 50
            return session.with_trees(answers[prompt[-1]])

    answers = {prompt[-1]: expected(prompt) for prompt in prompts}
    with Session(ranks, [*PROMPT[:50], 9], None) as first, ThreadPoolExecutor(4) as pool:
        together = list(pool.map(said, prompts))
        assert first.plain(4)
    assert together == list(answers.values())


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_worker(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "llama", num_layers=2)
    launcher = under_torchrun(tmp_path / "model", tmp_path)
    list(wait_until_serving([launcher]))
    session = Session(launcher.address, PROMPT, None)
    session.ask_plainly(400)
    next(session.responses)
    os.kill(rank_pid(launcher, 1), signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
        list(session.responses)
    # Its output ends when the launcher and all ranks have.
    assert list(wait_for_end([launcher])) == [launcher]
    assert time.monotonic() - killed < 40
    assert "the torchrun process ended with status 1" in launcher.obituary()
    assert "a rank has failed, so the worker ends" in launcher.log_path.read_text()


@pytest.mark.parametrize(("name", "value"), WRONG.items())
def test_what_ranks_do_not_do_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"--{name} \(SEQUOIA_{name.upper()}\) is {value}; with --tensor-parallel"):
        WorkerConfig(model="m", tensor_parallel=2, **{name: value})


def test_only_a_target_alone_runs_in_ranks() -> None:
    config = WorkerConfig(model="m", tensor_parallel=2)
    for hosted in ([(DRAFT, config)], [(VERIFY, config), (DRAFT, WorkerConfig(model="m"))]):
        with pytest.raises(InvalidArgument, match="tensor-parallel: it is for a verify worker"):
            serve(*hosted, environ={})


@pytest.mark.parametrize(("num_ranks", "environ"), [(2, {}), (2, {"WORLD_SIZE": "4"}), (1, {"WORLD_SIZE": "2"})])
def test_as_many_ranks_as_were_started_or_none(
    num_ranks: int, environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        check_world(num_ranks, environ)
    assert f"is {num_ranks}, and WORLD_SIZE is {environ.get('WORLD_SIZE', 1)}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(), "transformers has no tensor-parallel plan for gpt2 models"),
        (LlamaConfig(num_attention_heads=8, num_key_value_heads=2), "8 heads and 2 KV heads cannot be divided by 4"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused_by_name(config: Any, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=f"model: m .*{reason}"):
        check_plan(config, 4, "m")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has CUDA devices")
def test_a_device_that_transformers_would_not_take_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match=r"device: .* this machine's cpu devices"):
        join(2, "cuda")


def test_segments_are_the_same_behind_the_wire() -> None:
    cache = KVCache(num_layers=1, num_slots=2, slot_rows=64)
    tree = TokenTree(Topology((-1, 0, 0, 2)), (5, 6, 7, 8))
    with cache.slot() as first, cache.slot() as second:
        sent = [chunk_segment(first, range(33), logits=False), tree_segment(second, (3, 4), tree)]
        received = from_numbers(to_numbers(sent), KVCache(num_layers=1, num_slots=2, slot_rows=64))
    for one, other in zip(sent, received, strict=True):
        assert other.slot.first_row == one.slot.first_row
        assert (other.token_ids, other.logit_tokens) == (tuple(one.token_ids), one.logit_tokens)
        assert (other.prefix_len, other.first_row_written) == (one.prefix_len, one.first_row_written)
        for name in ("positions", "visible", "row_positions"):
            np.testing.assert_array_equal(getattr(other, name), getattr(one, name))
