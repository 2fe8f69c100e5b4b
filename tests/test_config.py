"""The loader of settings: a flag over its variable over the default, and errors that name both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass

import pytest

from sequoia import config


@dataclass(frozen=True)
class ServerSettings:
    """A server for this test."""

    model: str = config.setting(MISSING, "what to serve")
    num_slots: int = config.setting(4, "sessions at a time, at 100%")
    timeout_seconds: float = config.setting(1.5, "patience")
    device: str = config.setting("auto", "where to run", choices=("auto", "cpu"))
    trust_remote_code: bool = config.setting(False, "whether to run the model's own code")

    def __post_init__(self) -> None:
        if self.num_slots < 1:
            raise ValueError(f"--num-slots is {self.num_slots}; it must be at least 1")


def load(argv: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> ServerSettings:
    return config.load(ServerSettings, "server", argv, {"SEQUOIA_MODEL": "m"} if environ is None else environ)


def message_of_the_exit(
    capsys: pytest.CaptureFixture[str], argv: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> str:
    with pytest.raises(SystemExit) as raised:
        load(argv, environ)
    assert raised.value.code == 2
    return capsys.readouterr().err


def test_a_default_stands_when_nothing_is_said() -> None:
    assert load() == ServerSettings("m", 4, 1.5, "auto", False)


def test_a_variable_wins_over_the_default() -> None:
    environ = {"SEQUOIA_MODEL": "m", "SEQUOIA_NUM_SLOTS": "8", "SEQUOIA_TRUST_REMOTE_CODE": "yes"}
    assert load(environ=environ) == ServerSettings("m", 8, 1.5, "auto", True)


def test_a_flag_wins_over_its_variable() -> None:
    argv = ["--num-slots", "2", "--timeout-seconds=0.5", "--no-trust-remote-code"]
    environ = {"SEQUOIA_MODEL": "m", "SEQUOIA_NUM_SLOTS": "8", "SEQUOIA_TRUST_REMOTE_CODE": "1"}
    assert load(argv, environ) == ServerSettings("m", 2, 0.5, "auto", False)


@pytest.mark.parametrize(
    ("argv", "environ"),
    [(["--num-slots", "many"], {"SEQUOIA_MODEL": "m"}), ([], {"SEQUOIA_MODEL": "m", "SEQUOIA_NUM_SLOTS": "many"})],
)
def test_a_value_of_the_wrong_type_names_flag_and_variable(
    capsys: pytest.CaptureFixture[str], argv: list[str], environ: dict[str, str]
) -> None:
    message = message_of_the_exit(capsys, argv, environ)
    assert message == "error: --num-slots (SEQUOIA_NUM_SLOTS) is 'many'; it must be of type int\n"


def test_a_missing_required_value_names_flag_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    assert message_of_the_exit(capsys, environ={}).startswith("error: --model (SEQUOIA_MODEL) is required")


def test_a_value_outside_the_choices_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    message = message_of_the_exit(capsys, ["--device", "tpu"])
    assert message == "error: --device (SEQUOIA_DEVICE) is 'tpu'; it must be one of auto, cpu\n"


def test_a_word_that_is_neither_true_nor_false_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = message_of_the_exit(capsys, environ={"SEQUOIA_MODEL": "m", "SEQUOIA_TRUST_REMOTE_CODE": "maybe"})
    assert "--trust-remote-code (SEQUOIA_TRUST_REMOTE_CODE) is 'maybe'" in message


def test_what_the_dataclass_refuses_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert message_of_the_exit(capsys, ["--num-slots", "0"]) == "error: --num-slots is 0; it must be at least 1\n"


def test_an_unknown_flag_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--modle" in message_of_the_exit(capsys, ["--modle", "x"])


def test_help_shows_default_and_variable_of_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        load(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert raised.value.code == 0
    assert "sessions at a time, at 100% (default: 4; or SEQUOIA_NUM_SLOTS)" in shown
    assert "what to serve (required; or SEQUOIA_MODEL)" in shown


@dataclass(frozen=True)
class PairSettings:
    """Two servers in one process."""

    left: ServerSettings
    right: ServerSettings


PAIR_FLAGS = ("--left-model", "a", "--right-model", "b")


def test_the_flags_of_a_group_have_its_name_and_its_variables_count_for_all_groups() -> None:
    environ = {"SEQUOIA_NUM_SLOTS": "8"}
    loaded = config.load(PairSettings, "pair", [*PAIR_FLAGS, "--right-num-slots", "2"], environ)
    assert loaded == PairSettings(ServerSettings("a", 8), ServerSettings("b", 2))


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (PAIR_FLAGS[:2], "error: --right-model (SEQUOIA_MODEL) is required"),
        ((*PAIR_FLAGS, "--left-device", "tpu"), "error: --left-device (SEQUOIA_DEVICE) is 'tpu'"),
        ((*PAIR_FLAGS, "--right-num-slots", "0"), "error: --right-num-slots is 0; it must be at least 1"),
    ],
)
def test_an_error_in_a_group_names_the_group_s_flag(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], error: str
) -> None:
    with pytest.raises(SystemExit):
        config.load(PairSettings, "pair", argv, {})
    assert capsys.readouterr().err.startswith(error)
