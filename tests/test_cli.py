"""The command: exit statuses and messages, `generate` against a scripted coordinator, the life of child processes."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from sequoia.border import Context, error_border
from sequoia.cli import main
from sequoia.cli.deployment import DeploymentSettings
from sequoia.cli.figures import shares, verdict
from sequoia.cli.process import ServerProcess, stop, wait_for_end, wait_until_serving
from sequoia.cli.steps import Steps
from sequoia.client import StageSeconds
from sequoia.errors import InvalidArgument, Unavailable
from sequoia.hardware import LatencyCurve
from sequoia.planner import PlanInputs, choose
from sequoia.topology import DynamicShape
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import coordinator_pb2_grpc
from sequoia.v1.sampling_pb2 import RULE_COUPLED
from sequoia.wire import known_shape


class EchoCoordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Answers with the prompt it was given, and remembers the request."""

    def __init__(self) -> None:
        self.request = pb.GenerateRequest()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        self.request = request
        async with error_border(context):
            if request.sampling.temperature < 0:
                raise InvalidArgument("-1.0 is below 0", "temperature")
            text = request.text or request.chat.messages[0].content
            yield pb.GenerateResponse(num_prompt_tokens=3, text=text[:2], token_ids=[5])
            if text == "wait for ever":
                await asyncio.Event().wait()
            finish = pb.Finish(reason=pb.FINISH_REASON_LENGTH, num_completion_tokens=2, total_seconds=0.5)
            yield pb.GenerateResponse(text=text[2:], token_ids=[6], finish=finish)


@pytest.fixture
def coordinator() -> EchoCoordinator:
    return EchoCoordinator()


async def run_generate(address: str, *arguments: str) -> int:
    """The command, kept off the loop that serves it."""
    return await asyncio.to_thread(main, ["generate", "--address", address, *arguments])


async def test_generate_prints_the_text(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run_generate(address, "hello") == 0
    assert capsys.readouterr().out == "hello\n"


async def test_generate_prints_one_json_object(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run_generate(address, "héllo", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["text"], printed["token_ids"], printed["finish_reason"]) == ("héllo", [5, 6], "length")
    assert set(printed) == {"text", "token_ids", "finish_reason", "rule", "seed", "usage", "speculation"}
    assert printed["speculation"]["tree"] == {"size": 1, "levels": 1}
    stages = {"draft", "verify", "network", "host", "prefill", "forwards", "work", "draft_forwards", "draft_work"}
    assert set(printed["speculation"]["seconds"]) == stages


async def test_generate_prints_its_figures_on_stderr(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run_generate(address, "hello", "--stats") == 0
    captured = capsys.readouterr()
    assert captured.out == "hello\n"
    assert "tokens/s" in captured.err


async def test_the_prompt_is_a_users_message_unless_raw(address: str, coordinator: EchoCoordinator) -> None:
    await run_generate(address, "hello")
    assert coordinator.request.chat.messages[0].role == "user"
    await run_generate(address, "hello", "--raw")
    assert coordinator.request.text == "hello"


async def test_a_dash_reads_the_prompt_from_stdin(
    address: str, coordinator: EchoCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("héllo".encode())))
    await run_generate(address, "-", "--raw")
    assert coordinator.request.text == "héllo"


async def test_every_flag_reaches_the_request(address: str, coordinator: EchoCoordinator, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"const": "é"}', "utf-8")
    flags = "--max-tokens 7 --temperature 0.5 --top-p 0.9 --top-k 40 --seed 1 --stop a --stop b --tree -1,0,0,1"
    flags += " --min-p 0.1 --repetition-penalty 1.2 --presence-penalty 0.3 --frequency-penalty -0.4 --logit-bias 7=-2.5"
    flags += " --logit-bias 8=1 --min-tokens 2 --ignore-eos --stop-token-id 3 --logprobs 4 --rule coupled"
    flags += f" --json-schema {tmp_path / 'schema.json'}"
    assert await run_generate(address, "hello", *flags.split()) == 0
    request = coordinator.request
    sampling = request.sampling
    assert (sampling.min_p, sampling.repetition_penalty, sampling.ignore_eos) == (0.1, 1.2, True)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.3, -0.4)
    assert (dict(sampling.logit_bias), list(sampling.stop_token_ids)) == ({7: -2.5, 8: 1.0}, [3])
    assert (sampling.min_tokens, sampling.num_logprobs, sampling.json_schema) == (2, 4, '{"const": "é"}')
    assert request.speculation.rule == RULE_COUPLED
    assert (request.max_tokens, request.sampling.temperature, request.sampling.top_p) == (7, 0.5, 0.9)
    assert (request.sampling.top_k, request.sampling.seed, list(request.stop)) == (40, 1, [b"a", b"b"])
    assert list(request.speculation.topology.parents) == [-1, 0, 0, 1]


async def test_a_dynamic_tree_is_written_by_its_nodes_levels_and_width(
    address: str, coordinator: EchoCoordinator
) -> None:
    assert await run_generate(address, "hello", "--tree", "16x5d4") == 0
    assert known_shape(coordinator.request.speculation) == DynamicShape(16, 5, 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "error: temperature: -1.0 is below 0\n"),
        (["--tree", "-1,5"], "error: tree: '-1,5' is not a tree such as -1,0,0,1"),
        (["--tree", "4x5d1"], "error: tree: '4x5d1' is not a tree such as -1,0,0,1 or 16x5d4: levels is 5"),
        (["--tree", "-1,0", "--speculation", "off"], "error: tree: cannot be used with --speculation off\n"),
        (["--stop", "\udcff"], "error: stop: ['\\udcff'] is not a list of strings in UTF-8"),
    ],
)
async def test_a_wrong_argument_is_one_line_and_status_2(
    address: str, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert await run_generate(address, "hello", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_an_unreachable_coordinator_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--address", "127.0.0.1:1", "hello"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["generat"], ["generate"], ["generate", "hello", "--max-tokens", "many"]])
def test_wrong_usage_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "up", "demo", "plan"])
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as raised:
        main([command, "--help"])
    assert raised.value.code == 0
    assert f"usage: sequoia {command}" in capsys.readouterr().out


def test_help_loads_no_grpc_and_no_model_library() -> None:
    loaded = "import sys, sequoia.cli as c; c._parser([]); print({'grpc', 'rich', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def command_line(address: str, prompt: str) -> list[str]:
    run = "import sys; from sequoia.cli import main; sys.exit(main())"
    return [sys.executable, "-c", run, "generate", "--address", address, prompt]


async def test_a_reader_that_goes_away_is_no_traceback(address: str) -> None:
    read, write = os.pipe()
    os.close(read)
    process = await asyncio.create_subprocess_exec(*command_line(address, "hi"), stdout=write, stderr=PIPE)
    os.close(write)
    _, error = await process.communicate()
    assert (process.returncode, error) == (141, b"")


async def test_an_interrupt_is_no_traceback(address: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command_line(address, "wait for ever"),
        stdout=PIPE,
        stderr=PIPE,
        # A shell starts what runs in its background deaf to interrupts, these tests included.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert await process.stdout.readexactly(2) == b"wa"
    process.send_signal(signal.SIGINT)
    _, error = await process.communicate()
    assert (process.returncode, error) == (130, b"")


STUB_SERVER = """
import json, sys, signal
if "--fail" in sys.argv:
    sys.exit("error: --model is wrong")
print("noise from a library")
print(json.dumps({"event": "serving", "address": "127.0.0.1:1234"}), flush=True)
signal.pause()
"""

SHORT_LIVED_PARENT = """
import os, signal, sys
from pathlib import Path
from sequoia.cli.process import ServerProcess, wait_until_serving
environment = {**os.environ, "PYTHONPATH": sys.argv[1]}
process = ServerProcess("stub", "stub_server", {}, environment, Path(sys.argv[1]))
list(wait_until_serving([process]))
print(process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def start_stub(folder: Path, *flags: str) -> ServerProcess:
    (folder / "stub_server.py").write_text(STUB_SERVER)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return ServerProcess("stub", "stub_server", dict.fromkeys(flags, "1"), environment, folder)


def test_a_process_tells_its_address_and_stops(tmp_path: Path) -> None:
    process = start_stub(tmp_path)
    assert [each.address for each in wait_until_serving([process])] == ["127.0.0.1:1234"]
    stop([process])
    assert is_gone_within_seconds(process.pid, 0)


def test_a_process_that_dies_at_the_start_shows_its_last_lines(tmp_path: Path) -> None:
    process = start_stub(tmp_path, "fail")
    with pytest.raises(Unavailable, match=r"(?s)stub process ended with status 1.*error: --model is wrong"):
        list(wait_until_serving([process]))


def test_the_end_of_a_running_process_is_noticed(tmp_path: Path) -> None:
    process = start_stub(tmp_path)
    list(wait_until_serving([process]))
    process.kill()
    assert list(wait_for_end([process])) == [process]
    assert "was ended by SIGKILL" in process.obituary()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_process_dies_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "stub_server.py").write_text(STUB_SERVER)
    command = [sys.executable, "-c", SHORT_LIVED_PARENT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert is_gone_within_seconds(int(done.stdout), 5)


def is_gone_within_seconds(pid: int, seconds: float) -> bool:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    return bool(select.select([process], [], [], seconds)[0])


def test_the_default_draft_is_the_target_in_int8() -> None:
    settings = DeploymentSettings(target="t", num_threads=1)
    assert settings.worker_flags("draft") | {"listen": ""} == {
        "model": "t",
        "listen": "",
        "dtype": "auto",
        "engine": "auto",
        "num-threads": 1,
        "quantization": "int8",
        "device": "cpu",
    }
    assert settings.worker_flags("verify")["quantization"] == "none"
    assert "device" not in settings.worker_flags("verify")


def test_a_draft_of_its_own_decides_itself_about_int8_unless_asked() -> None:
    assert DeploymentSettings(draft="d").worker_flags("draft")["quantization"] == "auto"
    assert DeploymentSettings(draft="d", draft_quantization="int8").worker_flags("draft")["quantization"] == "int8"


def test_drafting_ahead_is_left_to_the_environment_unless_asked() -> None:
    assert "draft-ahead" not in DeploymentSettings().worker_flags("draft")
    asked = DeploymentSettings(draft_ahead="off")
    assert asked.worker_flags("draft")["draft-ahead"] == "off"
    assert "draft-ahead" not in asked.worker_flags("verify")


def test_without_a_draft_there_is_one_worker() -> None:
    assert list(DeploymentSettings(has_draft=False).models) == ["verify"]


INPUTS = PlanInputs(
    acceptance=(0.8, 0.1),
    verify_curve=LatencyCurve((1, 8), (0.1, 0.1)),
    draft_curve=LatencyCurve((1, 8), (0.01, 0.01)),
)


def test_a_plan_that_speculates_says_what_it_promises() -> None:
    plan = choose(INPUTS)
    assert re.fullmatch(
        r"speculate: (tree|chain) of \d x \d, predicted \d\.\d\d tokens/step and speedup \d\.\d\d", verdict(plan)
    )


def test_a_plan_that_does_not_speculate_names_the_best_that_would() -> None:
    slow = replace(INPUTS, draft_curve=LatencyCurve((1, 8), (0.2, 0.2)))
    assert verdict(choose(slow)).startswith("do not speculate: the best is ")


def test_the_shares_of_a_step_leave_prefill_out() -> None:
    stages = StageSeconds(draft=0.2, verify=0.6, network=0.1, host=0.1, prefill=5.0)
    assert shares(stages) == "draft 20%, verify 60%, network 10%, host 10%"


def test_steps_are_plain_lines_without_a_terminal() -> None:
    out = io.StringIO()
    with Steps(Console(file=out)).step("loading") as on_progress:
        on_progress(1, 2)
    assert re.fullmatch(r"loading \.\.\.\nloading: \d+\.\d s\n", out.getvalue())
