"""Where workers run: what auto makes of their devices, cores that are divided, and flags that contradict."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from sequoia.cli import deployment, main, placement
from sequoia.cli.deployment import DeploymentSettings
from sequoia.cli.placement import decide, describe, divide_cores
from sequoia.cli.process import ServerProcess, stop, wait_until_serving
from sequoia.errors import InvalidArgument

CORES = {"verify": (0,), "draft": (1,)}


@pytest.mark.parametrize("devices", [("auto", "auto"), ("cpu", "cpu"), ("cuda", "cuda")])
def test_auto_puts_workers_of_one_device_together(devices: tuple[str, str]) -> None:
    assert decide("auto", devices, {}) == "colocated"


@pytest.mark.parametrize(("has_cuda", "found"), [(True, "split"), (False, "colocated")])
def test_a_draft_on_the_cpu_is_apart_from_a_target_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, has_cuda: bool, found: str
) -> None:
    monkeypatch.setattr(placement, "_has_cuda", lambda: has_cuda)
    assert decide("auto", ("auto", "cpu"), {}) == found


def test_auto_splits_what_has_cores_of_its_own_and_what_has_no_draft() -> None:
    assert decide("auto", ("cpu", "cpu"), CORES) == "split"
    assert decide("auto", ("cpu",), {}) == "split"
    assert decide("auto", ("cuda", "cpu"), {}) == "split"


def test_what_is_asked_for_is_done() -> None:
    assert decide("split", ("cpu", "cpu"), {}) == "split"
    assert decide("colocated", ("cuda", "cpu"), {}) == "colocated"


@pytest.mark.parametrize(("devices", "cores"), [(("cpu",), {}), (("cpu", "cpu"), CORES)])
def test_colocated_without_a_draft_or_with_cores_apart_is_refused(
    devices: tuple[str, ...], cores: Mapping[str, tuple[int, ...]]
) -> None:
    with pytest.raises(InvalidArgument, match="placement: "):
        decide("colocated", devices, cores)


def test_cores_are_never_shared_and_none_asked_for_is_none_pinned() -> None:
    assert divide_cores({"verify": 2, "draft": 1}, {5, 4, 7, 6}) == {"verify": (4, 5), "draft": (6,)}
    assert divide_cores({"verify": None, "draft": 1}, range(4)) == {"verify": (0, 1, 2), "draft": (3,)}
    assert divide_cores({"verify": 1, "draft": None}, range(2)) == {"verify": (0,), "draft": (1,)}
    assert divide_cores({"verify": None, "draft": None}, range(4)) == {}


@pytest.mark.parametrize(
    ("asked", "flag"),
    [
        ({"verify": 3, "draft": 2}, "target-cores"),
        ({"verify": 4, "draft": None}, "target-cores"),
        ({"verify": 1, "draft": 0}, "draft-cores"),
        ({"verify": -1, "draft": None}, "target-cores"),
    ],
)
def test_too_many_cores_and_none_at_all_are_refused_by_flag(asked: Mapping[str, int | None], flag: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        divide_cores(asked, range(4))
    assert caught.value.field == flag


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--placement", "apart"), "argument --placement: invalid choice: 'apart'"),
        (("--placement", "colocated", "--no-draft"), "placement: colocated is for two workers"),
        (("--target-cores", "4096"), "target-cores: --target-cores 4096 and --draft-cores 1 are more than the "),
        (("--draft-cores", "1", "--no-draft"), "draft-cores: there is no draft"),
        (("--draft-cores", "one"), "argument --draft-cores: invalid int value: 'one'"),
    ],
)
def test_a_bad_flag_of_up_is_named_before_anything_starts(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], error: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        raise SystemExit(main(["up", "--target", "no-such-model", *flags]))
    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {error}")


def test_the_placement_is_told_to_people() -> None:
    assert describe("colocated", {}) == "colocated, all in one process, where the models take turns"
    assert describe("split", CORES) == "split, a process for each worker, verify on cores 0, draft on cores 1"


STUB_SERVER = """
import json, os, signal
print(json.dumps({"event": "serving", "address": ",".join(map(str, os.sched_getaffinity(0)))}), flush=True)
signal.pause()
"""


def test_a_process_keeps_to_its_cores(tmp_path: Path) -> None:
    (tmp_path / "stub_server.py").write_text(STUB_SERVER)
    core = max(os.sched_getaffinity(0))
    process = ServerProcess("stub", "stub_server", {}, {**os.environ, "PYTHONPATH": str(tmp_path)}, tmp_path, {core})
    assert [each.address for each in wait_until_serving([process])] == [str(core)]
    stop([process])


def test_pinned_workers_have_a_thread_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "available_cores", lambda: {4, 5, 6})
    settings = DeploymentSettings(target_cores=1)
    assert settings.cores == {"verify": (4,), "draft": (5, 6)}
    assert [settings.worker_flags(name)["num-threads"] for name in ("verify", "draft")] == [1, 2]
