"""Peers as real child processes: answers, and every way to fail."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sequoia.cli.benchmarks.peer_catalog import SCRIPTS
from sequoia.cli.benchmarks.peer_process import PeerFailed, PeerProcess

ECHO = """
import sys
from peer_protocol import Answer, Peer, serve
def load(request):
    print("a library's chatter")
    if request["variant"] == "refuse":
        raise ValueError("no GGUF file")
    return Peer("echo 1", request["variant"], lambda prompt, most: Answer(prompt[:most], 2.0, 0.5, 1))
sys.exit(serve(load))
"""


def peer(tmp_path: Path, code: str) -> PeerProcess:
    script = tmp_path / "peer.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    return PeerProcess(Path(sys.executable), script, environment, tmp_path / "log")


def test_a_peer_answers_in_json_whatever_its_libraries_print(tmp_path: Path) -> None:
    with peer(tmp_path, ECHO) as process:
        assert process.ask({"variant": "plain"}, 30) == {"engine": "echo 1", "settings": "plain"}
        answer = process.ask({"prompt_token_ids": [5, 6, 7], "max_tokens": 2}, 30)
    assert answer == {"token_ids": [5, 6], "seconds": 2.0, "first_token_seconds": 0.5, "num_steps": 1}
    assert "chatter" in (tmp_path / "log").read_text()


def test_a_peer_that_refuses_says_why(tmp_path: Path) -> None:
    with peer(tmp_path, ECHO) as process, pytest.raises(PeerFailed, match=r"^ValueError: no GGUF file$"):
        process.ask({"variant": "refuse"}, 30)


def test_a_peer_that_exits_leaves_the_end_of_its_log(tmp_path: Path) -> None:
    code = "import sys; sys.exit('libengine.so is missing')"
    with peer(tmp_path, code) as process, pytest.raises(PeerFailed, match=r"status 1: libengine\.so is missing"):
        process.ask({}, 30)


def test_a_peer_that_is_silent_is_given_up_and_does_not_outlive_the_benchmark(tmp_path: Path) -> None:
    code = "import signal; signal.pause()"
    with peer(tmp_path, code) as process, pytest.raises(PeerFailed, match="did not answer in time"):
        process.ask({}, 0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_what_is_no_json_is_shown(tmp_path: Path) -> None:
    with peer(tmp_path, "print('Segmentation')") as process, pytest.raises(PeerFailed, match="Segmentation"):
        process.ask({}, 30)
