"""The whole system on this machine: Redis, two workers and the coordinator, as processes that talk over loopback."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from sequoia.cli.process import ServerProcess, stop, wait_until_serving
from sequoia.cli.steps import Steps
from sequoia.config import num_cores
from sequoia.engine.sources import resolve


@dataclass(frozen=True)
class DeploymentSettings:
    """What to start. `draft` None means the target's own weights, which then are quantised to int8 by default."""

    target: str = "smollm2-135m"
    draft: str | None = None
    draft_quantization: str | None = None
    has_draft: bool = True
    dtype: str = "auto"
    listen: str = "127.0.0.1:50600"
    redis_url: str | None = None
    num_threads: int = 0
    context_length: int | None = None
    log_dir: Path | None = None

    @property
    def models(self) -> dict[str, str]:
        """The model of each worker, by its name."""
        draft = {"draft": self.draft or self.target} if self.has_draft else {}
        return {"verify": self.target, **draft}

    def worker_flags(self, name: str) -> dict[str, object]:
        """The flags of one worker."""
        flags: dict[str, object] = {
            "model": self.models[name],
            "listen": "127.0.0.1:0",
            "dtype": self.dtype,
            "num-threads": self.num_threads or num_cores(),
        }
        if self.context_length is not None:
            flags["context-length"] = self.context_length
        flags["quantization"] = self._draft_quantization if name == "draft" else "none"
        if flags["quantization"] == "int8":
            flags["device"] = "cpu"  # where there is a GPU, it is the target's
        return flags

    @property
    def _draft_quantization(self) -> str:
        return self.draft_quantization or ("none" if self.draft else "int8")


class Deployment:
    """A running system, from `with` to its end: the coordinator stops first, then the workers, then Redis.

    `address` is the coordinator's, `redis_url` that of its Redis, `processes` are "verify", "draft" (unless left out)
    and "coordinator". Raises Unavailable, with the end of its log, when a process ends before it serves.

    >>> with Deployment(DeploymentSettings(listen="127.0.0.1:0"), Steps(Console())) as system:
    ...     print(Client(system.address).generate("Hello").text)
    """

    def __init__(self, settings: DeploymentSettings, steps: Steps) -> None:
        self.processes: dict[str, ServerProcess] = {}
        self.redis_url = settings.redis_url or ""
        self._settings = settings
        self._steps = steps
        self._stack = ExitStack()
        self._log_dir = settings.log_dir or Path()

    def __enter__(self) -> Deployment:
        try:
            self._make_log_dir()
            self._fetch_weights()
            self._start_redis()
            self._start_workers()
            self._start_coordinator()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._steps.step("stopping"):
            self._stack.close()
        if self._settings.log_dir is None and kind in (None, KeyboardInterrupt):
            shutil.rmtree(self._log_dir)

    @property
    def address(self) -> str:
        """Where the coordinator listens."""
        return self.processes["coordinator"].address

    def kill(self, name: str) -> None:
        """Kill one process, as a crash would."""
        self.processes[name].kill()

    def _make_log_dir(self) -> None:
        if self._settings.log_dir is None:
            self._log_dir = Path(tempfile.mkdtemp(prefix="sequoia-"))
        self._log_dir.mkdir(parents=True, exist_ok=True)

    def _fetch_weights(self) -> None:
        """Here and not only in the workers, whose progress nobody sees."""
        revision, cache_dir = (os.environ.get(name) or None for name in ("SEQUOIA_REVISION", "SEQUOIA_CACHE_DIR"))
        for model in dict.fromkeys(self._settings.models.values()):
            files = resolve(model, revision=revision, cache_dir=Path(cache_dir) if cache_dir else None)
            self._steps.say(f"weights of {model}: {files.directory}")

    def _start_redis(self) -> None:
        if not self.redis_url:
            from sequoia.cli.redis import EmbeddedRedis

            with self._steps.step("starting Redis"):
                self.redis_url = self._stack.enter_context(EmbeddedRedis()).url

    def _start_workers(self) -> None:
        models = self._settings.models
        with self._steps.step("loading " + " and ".join(f"{model} to {name}" for name, model in models.items())):
            self._start({name: (f"{name}_worker.server", self._settings.worker_flags(name)) for name in models})

    def _start_coordinator(self) -> None:
        addresses = {name: process.address for name, process in self.processes.items()}
        flags = {"listen": self._settings.listen, "redis": self.redis_url, "draft": "", **addresses}
        with self._steps.step("starting the coordinator"):
            self._start({"coordinator": ("coordinator.server", flags)})

    def _start(self, servers: Mapping[str, tuple[str, Mapping[str, object]]]) -> None:
        """Start the servers, each a module and its flags, all at a time, and wait until they serve."""
        started: list[ServerProcess] = []
        self._stack.callback(stop, started)
        environment = _environment(self._settings.num_threads or num_cores())
        for name, (module, flags) in servers.items():
            started.append(ServerProcess(name, module, flags, environment, self._log_dir))
        for process in wait_until_serving(started):
            self._steps.say(f"  {process.name} serves on {process.address}, process {process.pid}")
        self.processes.update((process.name, process) for process in started)


def _environment(num_threads: int) -> dict[str, str]:
    """For two workers that take turns on the same cores, with weights in huge pages.

    An idle thread spins for well under a millisecond: long enough for the barriers inside a forward, short enough not
    to take a core from the other worker. Sleeping at once (OMP_WAIT_POLICY=passive) makes forwards half as long again.
    """
    ours = {"OMP_NUM_THREADS": str(num_threads), "GOMP_SPINCOUNT": "10000", "THP_MEM_ALLOC_ENABLE": "1"}
    return {**os.environ, **ours}
