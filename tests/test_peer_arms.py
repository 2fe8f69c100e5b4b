"""Peers as arms: what they are told, what they answer, and those that are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from test_text import SPECIAL, byte_level

from coordinator.text import TextCodec
from sequoia.cli.benchmarks.arm_measuring import ArmAnswer
from sequoia.cli.benchmarks.peer_arms import Peers, Workplace, started_peers
from sequoia.cli.benchmarks.peer_catalog import PEERS, PeerKind
from sequoia.cli.benchmarks.peer_models import PeerModel, PeerModels, PeerWork, encode
from sequoia.cli.benchmarks.prompt_set import BenchPrompt
from sequoia.cli.steps import Steps

# Answers with the prompt backwards, and shows what it was loaded with.
SCRIPT = """
import json, sys
load = sys.stdin.readline()
print(json.dumps({"engine": "backwards 1", "settings": load}), flush=True)
for line in sys.stdin:
    tokens = json.loads(line)["prompt_token_ids"][::-1]
    print(json.dumps({"token_ids": tokens, "seconds": 2.0, "first_token_seconds": 0.5, "num_steps": 2}), flush=True)
"""
PROMPT = BenchPrompt("code", "a", "the quick brown")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeerWork:
    script = tmp_path / "backwards.py"
    script.write_text(SCRIPT)
    for name, variant in (("backwards", "plain"), ("drafted", "draft")):
        monkeypatch.setitem(PEERS, name, PeerKind(script, variant))
    tokenizer = byte_level()
    codec = TextCodec(tokenizer, None, frozenset({tokenizer.token_to_id(SPECIAL[1])}))
    models = PeerModels(PeerModel("/models/target", None, "/cache"), None, "bfloat16", codec, "")
    return PeerWork(models, encode(models, [PROMPT], is_raw=True), max_tokens=300)


def workplace(tmp_path: Path, most_bytes: float = float("inf")) -> Workplace:
    return Workplace(tmp_path, tmp_path, num_threads=1, most_bytes=most_bytes, steps=Steps(Console(quiet=True)))


def test_a_peer_is_told_the_models_and_answers_token_ids(tmp_path: Path, work: PeerWork) -> None:
    with started_peers(["backwards"], work, workplace(tmp_path)) as peers:
        [arm] = peers.arms
        answer = arm.answer(PROMPT, 300)
    told = json.loads(arm.settings)
    assert (told["target"]["folder"], told["draft"], told["variant"]) == ("/models/target", None, "plain")
    assert (told["dtype"], told["num_threads"], told["eos_token_ids"]) == ("bfloat16", 1, [1])
    assert told["context_length"] == 512, "room for the prompt and 300 tokens, rounded"
    ids = work.prompts[PROMPT]
    assert answer == ArmAnswer(ids[::-1], 2.0, 0.5, 2, len(ids))


def test_a_peer_beyond_the_memory_limit_is_ended_and_says_so(tmp_path: Path, work: PeerWork) -> None:
    with started_peers(["backwards"], work, workplace(tmp_path, most_bytes=1.0)) as peers:
        assert peers.arms == []
        assert "(--memory-gib)" in peers.unavailable["backwards"]


def test_a_peer_that_drafts_needs_a_draft_and_the_others_go_on(tmp_path: Path, work: PeerWork) -> None:
    with started_peers(["drafted", "backwards"], work, workplace(tmp_path)) as peers:
        assert isinstance(peers, Peers)
        assert peers.unavailable == {"drafted": "there is no draft to give to it"}
        assert [each.name for each in peers.arms] == ["backwards"]


def test_idle_threads_of_peers_may_not_spin_for_long(tmp_path: Path) -> None:
    environment = workplace(tmp_path).environment
    assert (environment["GOMP_SPINCOUNT"], environment["KMP_BLOCKTIME"]) == ("10000", "1")
    assert "PYTHONPATH" not in environment
