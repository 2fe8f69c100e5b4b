"""`sequoia train-draft` as users run it: a folder that serves as a draft, the text unchanged, a run that goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import write_tiny_model
from transformers import AutoModelForCausalLM

from sequoia.cli import main
from sequoia.cli.deployment import Deployment, DeploymentSettings
from sequoia.cli.steps import Steps
from sequoia.cli.training.recipe import Size, read_openings
from sequoia.client import Client
from sequoia.engine import packed
from sequoia.engine.distillation.corpus import Shard
from sequoia.engine.draft_vocabulary import FILE
from sequoia.errors import InvalidArgument
from sequoia.topology import Topology

# Few and short documents of a tiny model: seconds.
SMALL = ("--documents=16", "--question-tokens=4", "--answer-tokens=12", "--steps=25", "--batch-tokens=1024")


def train(target: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(Path(sys.executable).with_name("sequoia")),
        "train-draft",
        f"--target={target}",
        f"--out={out}",
        *SMALL,
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    write_tiny_model(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def trained(target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("draft")
    done = train(target, out, "--size=1x256", "--size=2xall", "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_every_size_is_told_and_the_best_is_kept(trained) -> None:
    out, made = trained
    assert {each["size"] for each in made} == {"1x256", "2xall"}
    assert made[0]["tokens_per_second"] >= made[1]["tokens_per_second"]
    assert json.loads((out / "training.json").read_text()) == made[0]
    assert (out / FILE).exists() == (made[0]["size"] == "1x256")
    assert not any(each.is_dir() for each in (out / "unfinished").iterdir())


def test_the_card_states_pair_text_training_and_acceptance(trained, target) -> None:
    out, made = trained
    card = (out / "README.md").read_text()
    for fact in (str(target), made[0]["tokenizer_hash"], "25 steps", f"{made[0]['acceptance'][0]:.3f}", "train-draft"):
        assert fact in card


def test_known_tokens_are_those_that_the_target_expects_most(trained) -> None:
    narrow = next(each for each in trained[1] if each["size"] == "1x256")
    assert narrow["num_tokens_known"] == 256
    assert 256 / 400 < narrow["coverage"] < 1.0


def test_a_second_run_goes_on_where_the_first_one_ended(trained, target, tmp_path) -> None:
    out, made = trained
    done = train(target, tmp_path / "again", f"--corpus={out / 'corpus'}", f"--size={made[0]['size']}", "--json")
    assert done.returncode == 0, done.stderr
    [again] = json.loads(done.stdout)
    assert again["acceptance"] == made[0]["acceptance"]
    unfinished = train(target, out, "--size=1x256", "--packed", "--json")
    assert unfinished.returncode == 0, unfinished.stderr
    [told] = json.loads(unfinished.stdout)
    first = next(each for each in made if each["size"] == "1x256")
    assert (told["num_steps"], told["loss"]) == (25, first["loss"])
    assert {each.name for each in out.glob("*.safetensors")} == {FILE, packed.FILE}, "one draft, in one form"


@pytest.fixture(scope="module")
def client(trained, target: Path) -> Iterator[Client]:
    settings = DeploymentSettings(
        target=str(target), draft=str(trained[0]), dtype="float32", listen="127.0.0.1:0", num_threads=1
    )
    with (
        Deployment(settings, Steps(Console(quiet=True))) as deployment,
        Client(deployment.address, timeout_seconds=60) as client,
    ):
        yield client


@pytest.mark.parametrize("parameters", [{"temperature": 0}, {"temperature": 0.9, "seed": 3}])
def test_the_draft_changes_no_text(client: Client, parameters: dict[str, Any]) -> None:
    prompt = list(range(40, 60))
    plain, tree = (
        client.generate(prompt, max_tokens=48, ignore_eos=True, speculation=each, **parameters)
        for each in ("off", Topology((-1, 0, 0, 1, 1, 3)))
    )
    assert tree.token_ids == plain.token_ids
    assert tree.speculation.num_drafted_steps > 0


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--size=9x64"], "size: 9x64 is not within the target's 4 x 400"),
        (["--size=1x401"], "size: 1x401 is not within"),
        (["--size=two"], "'two' is no size"),
        (["--train-from=smollm2-135m"], "train-from: smollm2-135m has another vocabulary than"),
        (["--answer-tokens=2000"], "answer-tokens: documents of up to 20"),
        (["--step-overhead=nan"], "step-overhead"),
        (["--steps=-1"], "steps"),
        (["--learning-rate=2"], "learning-rate"),
        (["--text=/nowhere/at/all"], "text: /nowhere/at/all cannot be read"),
        (["--openings=/nowhere"], "openings: /nowhere cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_by_name(target, tmp_path, flags, problem) -> None:
    done = train(target, tmp_path / "out", *flags)
    assert (done.returncode, problem in done.stderr) == (2, True), done.stderr


def test_a_packed_draft_of_a_target_in_several_files_is_refused_before_the_work(target, tmp_path) -> None:
    shutil.copytree(target, tmp_path / "target")
    AutoModelForCausalLM.from_pretrained(target).save_pretrained(tmp_path / "target", max_shard_size="100KB")
    (tmp_path / "target" / "model.safetensors").unlink(missing_ok=True)
    done = train(tmp_path / "target", tmp_path / "out", "--packed")
    assert (done.returncode, "packed: cannot refer to" in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out" / "corpus").exists()


def test_without_steps_it_is_the_target_over_fewer_tokens(trained, target, tmp_path) -> None:
    flags = (f"--corpus={trained[0] / 'corpus'}", "--steps=0", "--packed", "--json")
    narrow = train(target, tmp_path / "narrow", "--size=4x256", *flags)
    assert narrow.returncode == 0, narrow.stderr
    [made] = json.loads(narrow.stdout)
    assert (made["num_steps"], made["loss"], made["num_tokens_known"]) == (0, None, 256)
    assert load_file(tmp_path / "narrow" / packed.FILE) == {}, "all of it is the target's"
    assert "as they are" in (tmp_path / "narrow" / "README.md").read_text()
    usual = train(target, tmp_path / "usual", *flags)
    assert json.loads(usual.stdout)[0]["size"] == "4xall"


def test_a_draft_is_trained_further(trained, target, tmp_path) -> None:
    first = next(each for each in trained[1] if each["size"] == "1x256")
    corpus, again = f"--corpus={trained[0] / 'corpus'}", tmp_path / "again"
    begun = train(target, again, corpus, "--size=1x256", "--packed", "--json")
    assert begun.returncode == 0, begun.stderr
    further = train(target, tmp_path / "further", corpus, f"--train-from={again}", "--packed", "--json")
    assert further.returncode == 0, further.stderr
    [made] = json.loads(further.stdout)
    assert (made["size"], made["coverage"], made["began_as"].split(",")[0]) == ("1x256", first["coverage"], str(again))
    assert made["loss"] < first["loss"]
    assert f"begun as {again}" in (tmp_path / "further" / "README.md").read_text()
    sized = train(target, tmp_path / "sized", corpus, f"--train-from={again}", "--size=1x256")
    assert (sized.returncode, "size: is that of" in sized.stderr) == (2, True), sized.stderr


def test_a_whole_model_is_trained_further_as_a_draft(target, tmp_path) -> None:
    done = train(target, tmp_path / "out", f"--train-from={target}", "--json")
    assert done.returncode == 0, done.stderr
    [made] = json.loads(done.stdout)
    assert (made["size"], made["coverage"]) == ("4xall", 1.0)


def test_a_packed_draft_finds_its_target_from_any_folder(target, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(target.parent)
    done = train(Path(target.name), tmp_path / "out", "--steps=0", "--packed")
    assert done.returncode == 0, done.stderr
    assert packed.target_of(tmp_path / "out") == str(target)


def test_a_text_of_nothing_is_refused(target, tmp_path) -> None:
    (tmp_path / "empty.txt").touch()
    done = train(target, tmp_path / "out", f"--text={tmp_path / 'empty.txt'}")
    assert (done.returncode, "text: holds no text" in done.stderr) == (2, True), done.stderr


def test_a_text_of_the_users_is_learnt_from(target, tmp_path) -> None:
    (tmp_path / "own.txt").write_text("The sky is blue because short waves of light are scattered. " * 8)
    done = train(target, tmp_path / "out", f"--text={tmp_path / 'own.txt'}", "--json")
    assert done.returncode == 0, done.stderr
    own = Shard.load(tmp_path / "out" / "corpus" / "read.safetensors")
    written = Shard.load(tmp_path / "out" / "corpus" / "0001.safetensors")
    assert json.loads(done.stdout)[0]["num_text_tokens"] == own.num_tokens + written.num_tokens


def test_a_folder_of_something_else_is_left_alone(target, tmp_path) -> None:
    (tmp_path / "README.md").write_text("mine")
    done = train(target, tmp_path)
    assert (done.returncode, "out: " in done.stderr) == (2, True), done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["README.md"]


def test_text_of_another_target_is_not_taken(trained, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_tiny_model(other, "llama", seed=2)
    done = train(other, tmp_path / "out", f"--corpus={trained[0] / 'corpus'}")
    assert done.returncode == 1
    assert "corpus: " in done.stderr


@pytest.mark.parametrize("content", ["[]", '{"code": "Write"}', '{"code": []}', "{", '{"code": [""]}'])
def test_openings_of_another_form_are_refused(tmp_path, content) -> None:
    file = tmp_path / "openings.json"
    file.write_text(content)
    with pytest.raises(InvalidArgument) as raised:
        read_openings(file)
    assert raised.value.field == "openings"


@pytest.mark.parametrize(("text", "size"), [("2x12288", Size(2, 12288)), ("4xall", Size(4, 0))])
def test_a_size_is_written_as_it_is_read(text, size) -> None:
    assert (Size.parse(text), str(size)) == (size, text)


def test_help_needs_no_torch(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["train-draft", "--help"])
    assert "--size" in capsys.readouterr().out
