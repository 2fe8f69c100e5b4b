"""Peers as arms: started one after the other, each with its own copy of the models, idle while others answer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sequoia.cli.benchmarks.arm_measuring import ArmAnswer
from sequoia.cli.benchmarks.peer_catalog import PEERS, PeerKind
from sequoia.cli.benchmarks.peer_environments import python_of
from sequoia.cli.benchmarks.peer_models import PeerWork
from sequoia.cli.benchmarks.peer_process import PeerFailed, PeerProcess
from sequoia.cli.benchmarks.prompt_set import BenchPrompt
from sequoia.cli.steps import Steps
from sequoia.process_memory import resident_bytes

# Loading may convert a model first.
_LOAD_TIMEOUT_SECONDS = 1200.0
_ANSWER_TIMEOUT_SECONDS = 600.0
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class PeerArm:
    """A loaded peer."""

    name: str
    engine: str
    settings: str
    process: PeerProcess
    prompts: Mapping[BenchPrompt, Sequence[int]]

    def answer(self, prompt: BenchPrompt, max_tokens: int) -> ArmAnswer:
        """Raises PeerFailed."""
        request = {"prompt_token_ids": list(self.prompts[prompt]), "max_tokens": max_tokens}
        found = self.process.ask(request, _ANSWER_TIMEOUT_SECONDS)
        tokens = tuple(found["token_ids"])
        num_steps = found["num_steps"]
        return ArmAnswer(
            tokens, found["seconds"], found["first_token_seconds"], num_steps, len(tokens) if num_steps else None
        )


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where peers are kept and how they are started: all of one benchmark alike."""

    folder: Path  # for environments
    log_dir: Path
    num_threads: int
    most_bytes: float  # that all peers may hold together
    steps: Steps

    @property
    def environment(self) -> dict[str, str]:
        """As our workers have it: an idle thread spins for well under a millisecond, weights lie in huge pages."""
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        threads = {"OMP_NUM_THREADS": str(self.num_threads), "GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
        return {**inherited, **threads, "THP_MEM_ALLOC_ENABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(slots=True)
class Peers:
    """Those that were started, and why the others were not."""

    arms: list[PeerArm] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)


@contextmanager
def started_peers(names: Sequence[str], work: PeerWork, workplace: Workplace) -> Iterator[Peers]:
    """Start and load; they end with the context. One that fails is among the unavailable, whatever the reason."""
    found = Peers()
    with ExitStack() as stack:
        for name in names:
            try:
                with ExitStack() as own:
                    arm = _start(name, work, workplace, own)
                    _check_memory([*found.arms, arm], workplace.most_bytes)
                    found.arms.append(arm)
                    stack.push(own.pop_all())
            except PeerFailed as error:
                found.unavailable[name] = str(error)
        yield found


def _start(name: str, work: PeerWork, workplace: Workplace, stack: ExitStack) -> PeerArm:
    kind = PEERS[name]
    if kind.needs_draft and work.models.draft is None:
        raise PeerFailed("there is no draft to give to it")
    process = _process(name, kind, workplace)
    request = work.load_request(kind.variant, workplace.num_threads)
    with workplace.steps.step(f"loading {name}"):
        found = stack.enter_context(process).ask(request, _LOAD_TIMEOUT_SECONDS)
    return PeerArm(name, found["engine"], found["settings"], process, work.prompts)


def _process(name: str, kind: PeerKind, workplace: Workplace) -> PeerProcess:
    python = python_of(kind.environment, workplace.folder, workplace.steps)
    return PeerProcess(python, kind.script, workplace.environment, workplace.log_dir / f"peer-{name}.log")


def _check_memory(arms: Sequence[PeerArm], most_bytes: float) -> None:
    """Raises PeerFailed when the last of them is one too many."""
    held = resident_bytes(arm.process.pid for arm in arms) or 0
    if held > most_bytes:
        limit = f"{held / _GIB:.1f} GiB with it, of {most_bytes / _GIB:.1f} allowed (--memory-gib)"
        raise PeerFailed(f"the peers would hold too much memory: {limit}")
