"""`sequoia bench offload`: hand-made figures whose ceiling is known, a disk that is read whole, and a real run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_offload_system import LIMIT, large, one_slot  # noqa: F401 - two fixtures
from tiny_models import write_tiny_model

from sequoia.cli import main
from sequoia.cli.benchmarks.arm_figures import figures_of
from sequoia.cli.benchmarks.arm_measuring import ArmAnswer, Sample
from sequoia.cli.benchmarks.offload import tables
from sequoia.cli.benchmarks.prompt_set import BenchPrompt
from sequoia.cli.benchmarks.raw_tiers import RawCopy, RawDisk
from sequoia.cli.benchmarks.streaming import OffloadFigures, Streamed, WatchedArm
from sequoia.client import StageSeconds
from sequoia.v1 import worker_pb2


class Worker:
    """Whose forwards each read 2 GB in 1 s and compute half of it."""

    def __init__(self) -> None:
        self.num_forwards = 3

    def GetStatus(self, request: worker_pb2.GetStatusRequest) -> worker_pb2.GetStatusResponse:
        count = self.num_forwards
        offload = worker_pb2.OffloadStatus(
            num_forwards=count,
            num_bytes=2_000_000_000 * count,
            read_seconds=1.0 * count,
            forward_seconds=1.0 * count,
            stall_seconds=0.5 * count,
        )
        return worker_pb2.GetStatusResponse(offload=offload)


class Disk:
    def bytes_per_second(self) -> float:
        return 2.5e9


class Arm:
    """Answers 9 tokens: one, and 8 by as many steps as it is said to need, of so many seconds."""

    def __init__(self, name: str, worker: Worker, num_steps: int, draft_seconds: float) -> None:
        self.name, self._worker = name, worker
        self._num_steps, self._draft_seconds = num_steps, draft_seconds

    def answer(self, prompt: BenchPrompt, max_tokens: int) -> ArmAnswer:
        self._worker.num_forwards += self._num_steps + 1
        stages = StageSeconds(self._draft_seconds * self._num_steps, self._num_steps, 0.0, 0.0, 1.0)
        seconds = 1.0 + self._num_steps * (1.0 + self._draft_seconds)
        return ArmAnswer(tuple(range(9)), seconds, 1.0, self._num_steps, 8, stages)


def figures() -> OffloadFigures:
    worker, prompts = Worker(), [BenchPrompt("code", name, "") for name in ("warm-up", "a", "b")]
    arms = [
        WatchedArm(Arm("off", worker, 8, 0.0), worker, Disk()),  # type: ignore[arg-type]
        WatchedArm(Arm("plan", worker, 2, 0.2), worker, Disk()),  # type: ignore[arg-type]
    ]
    samples = [Sample(arm.name, prompt, 0, arm.answer(prompt, 9)) for prompt in prompts for arm in arms]
    return OffloadFigures.of(0.0, arms, figures_of(samples[2:]), None)


def test_the_ceiling_is_what_the_disk_and_the_acceptance_allow() -> None:
    found = figures()
    assert found.off.streamed == Streamed(18, 36_000_000_000, 18.0, 18.0, 9.0), "the warm-up is not counted"
    assert found.plan.streamed.num_forwards == 6
    assert (found.off.tokens_per_step, found.plan.tokens_per_step) == (1.0, 4.0)
    assert found.off.seconds_per_token == pytest.approx(1.0)
    assert found.plan.seconds_per_token == pytest.approx(2 * 1.2 / 8)
    assert found.speedup == pytest.approx(8 / 2.4)
    assert found.ceiling == pytest.approx(4 * 0.8 / (0.8 + 0.2)), "2 GB at 2.5 GB/s; computing is hidden"
    assert found.streaming_efficiency == pytest.approx(0.8)
    assert found.plan.streamed.compute_seconds == pytest.approx(0.5)


def test_figures_are_shown_and_told() -> None:
    found = figures()
    document = json.loads(json.dumps(found.to_dict()))
    assert document["ceiling"] == found.ceiling
    assert document["plan"]["stall_seconds_of_forward"] == pytest.approx(0.5)
    console = Console(width=200, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(*tables([found]))
    text = console.export_text()
    assert "104%" in text, "of the ceiling"
    assert "3.33" in text


def test_a_raw_disk_reads_its_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path, size in zip(paths, (20 << 20, 5_000), strict=True):
        path.write_bytes(os.urandom(size))
    counts, preadv = list[int](), os.preadv

    def counting(*arguments: Any) -> int:
        counts.append(preadv(*arguments))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    assert RawDisk(paths).bytes_per_second() > 0
    assert sum(counts) == (20 << 20) + 5_000


def test_a_raw_copy_has_a_rate() -> None:
    assert RawCopy("cpu").bytes_per_second() > 1e8


@pytest.mark.parametrize(("flags", "field"), [(["--no-draft"], "no-draft"), (["--offload", "none"], "offload")])
def test_what_leaves_nothing_to_compare_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], field: str
) -> None:
    write_tiny_model(tmp_path / "model", "llama")
    assert main(["bench", "offload", f"--target={tmp_path / 'model'}", *flags]) == 2
    assert f"{field}: leaves nothing to compare" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_run(capfd: pytest.CaptureFixture[str], large: Path) -> None:  # noqa: F811
    flags = [
        "--quick",
        "--max-tokens=8",
        "--temperature=0",
        "--temperature=0.6",
        "--num-threads=1",
        "--json",
        "--resident-layers=2",
    ]
    assert main(["bench", "offload", f"--target={large}", f"--memory-limit={LIMIT}", *flags]) == 0
    cool, warm = json.loads(capfd.readouterr().out)["temperatures"]
    for found in (cool, warm):
        assert found["off"]["tokens_per_step"] == 1.0
        assert found["num_prompts_that_differ"] == 0
        assert 0.0 < found["ceiling"] < 64.0
        # One a token, and some more where a prompt is longer than a chunk.
        assert 5 < found["off"]["streamed"]["num_forwards"] <= 5 * 8 + 10
