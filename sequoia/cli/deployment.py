"""The whole system on this machine: Redis, and two workers and the coordinator, in one process or in three."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType

from sequoia.cli.placement import FLAG_PREFIX, available_cores, decide, describe, divide_cores
from sequoia.cli.process import ServerProcess, stop, wait_until_serving
from sequoia.cli.steps import Progress, Steps
from sequoia.config import MODEL_FREE, num_cores
from sequoia.engine.sources import resolve
from sequoia.errors import InvalidArgument

# Nodes of a tree, at most, where a forward costs what it costs to read the weights.
_OFFLOADED_TREE_SIZE = 768
_COORDINATOR = "sequoia.v1.CoordinatorService"


@dataclass(frozen=True)
class DeploymentSettings:
    """What to start. `draft` None means the target's own weights, which then are quantised to int8 by default."""

    target: str = "smollm2-135m"
    draft: str | None = None
    target_quantization: str = "none"
    draft_quantization: str | None = None
    engine: str = "auto"
    has_draft: bool = True
    dtype: str = "auto"
    listen: str = "127.0.0.1:50600"
    redis_url: str | None = None
    http_port: int | None = None  # of the OpenAI API, on loopback; 0: a free one; None: without it
    num_threads: int = 0
    context_length: int | None = None
    placement: str = "auto"  # auto, colocated or split
    target_cores: int | None = None  # cores that the split workers are pinned to; None: all, or what the other leaves
    draft_cores: int | None = None
    log_dir: Path | None = None
    offload: str = "none"  # where the target's weights are: none, disk, host or auto
    memory_limit: str | None = None  # of the offloaded target, as 2GiB
    resident_layers: int | None = None  # of it; None: as many as fit
    draft_ahead: str | None = None  # auto, on or off; None: as the environment has it
    prefix_reuse: str | None = None  # on or off; None: the same

    @property
    def models(self) -> dict[str, str]:
        """The model of each worker, by its name."""
        draft = {"draft": self.draft or self.target} if self.has_draft else {}
        return {"verify": self.target, **draft}

    @cached_property
    def cores(self) -> dict[str, tuple[int, ...]]:
        """The cores each worker is pinned to; empty: none is. Raises InvalidArgument when they are too many."""
        if self.target_cores is None and self.draft_cores is None:
            return {}
        if self.draft_cores is not None and not self.has_draft:
            raise InvalidArgument("there is no draft", "draft-cores")
        asked = {"verify": self.target_cores, "draft": self.draft_cores}
        return divide_cores({name: asked[name] for name in self.models}, available_cores())

    def num_threads_of(self, name: str) -> int:
        """CPU threads of one worker: by default one for each of its cores."""
        return self.num_threads or len(self.cores.get(name, ())) or num_cores()

    def worker_flags(self, name: str) -> dict[str, object]:
        """The flags of one worker."""
        flags: dict[str, object] = {
            "model": self.models[name],
            "listen": "127.0.0.1:0",
            "dtype": self.dtype,
            "engine": self.engine,
            "num-threads": self.num_threads_of(name),
        }
        if self.context_length is not None:
            flags["context-length"] = self.context_length
        if self.prefix_reuse is not None:
            flags["prefix-reuse"] = self.prefix_reuse
        if name == "draft" and self.draft_ahead is not None:
            flags["draft-ahead"] = self.draft_ahead
        if self.offload != "none":
            flags["max-tree-size"] = _OFFLOADED_TREE_SIZE
        if name == "draft" and self._drafts_offloaded:
            # It is packed without ever being in memory whole.
            flags["offload"] = "disk" if self.offload == "disk" else "auto"
        if name == "verify" and (self.offload != "none" or self.memory_limit):
            flags |= {"offload": self.offload, "memory-limit": self.memory_limit or ""}
        if name == "verify" and self.resident_layers is not None:
            flags["resident-layers"] = self.resident_layers
        flags["quantization"] = self._draft_quantization if name == "draft" else self.target_quantization
        if flags["quantization"] in ("int8", "int4"):
            flags["device"] = "cpu"  # where there is a GPU, it is the target's
        return flags

    @property
    def _draft_quantization(self) -> str:
        return self.draft_quantization or ("auto" if self.draft or self._drafts_offloaded else "int8")

    @property
    def _drafts_offloaded(self) -> bool:
        """Whether the draft is the offloaded target's own weights."""
        return self.offload != "none" and self.draft in (None, self.target)


@dataclass(frozen=True, slots=True)
class _Program:
    """A server to start."""

    module: str
    flags: Mapping[str, object]
    num_threads: int
    cores: tuple[int, ...] = ()  # that it is pinned to; empty: none
    secrets: Mapping[str, str] = field(default_factory=dict)  # variables: flags are read by whoever lists processes
    service: str = ""  # whose address is the process's; empty: the first that it tells


class Deployment:
    """A running system, from `with` to its end: the coordinator stops first, then the workers, then Redis.

    `address` is the coordinator's, `redis_url` that of its Redis, `addresses` are those of "verify" and "draft" (unless
    left out), and `url` is the OpenAI API's, if there is one. `processes` are these two and "coordinator", or "system"
    when `placement` is colocated, and "gateway" if there is one. Raises InvalidArgument for a placement that cannot be,
    and Unavailable, with the end of its log, when a process ends before it serves.

    >>> with Deployment(DeploymentSettings(listen="127.0.0.1:0"), Steps(Console())) as system:
    ...     print(Client(system.address).generate("Hello").text)
    """

    def __init__(self, settings: DeploymentSettings, steps: Steps) -> None:
        self.processes: dict[str, ServerProcess] = {}
        self.addresses: dict[str, str] = {}
        self.placement = ""
        self.redis_url = settings.redis_url or ""
        self._settings = settings
        self._steps = steps
        self._stack = ExitStack()
        self._log_dir = settings.log_dir or Path()

    def __enter__(self) -> Deployment:
        try:
            self._place_workers()
            self._make_log_dir()
            self._fetch_weights()
            self._start_redis()
            self._start_workers()
            self._start_coordinator()
            self._start_gateway()
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
        return self.processes["system" if self.placement == "colocated" else "coordinator"].address

    @property
    def url(self) -> str | None:
        """Where the OpenAI API is."""
        gateway = self.processes.get("gateway")
        return f"{gateway.address}/v1" if gateway else None

    def kill(self, name: str) -> None:
        """Kill one process, as a crash would."""
        self.processes[name].kill()

    def _place_workers(self) -> None:
        flags = (self._settings.worker_flags(name) for name in self._settings.models)
        ours = os.environ.get("SEQUOIA_DEVICE", "auto")
        devices = [str(each.get("device", ours)) for each in flags]
        self.placement = decide(self._settings.placement, devices, self._settings.cores)
        self._steps.say(f"placement: {describe(self.placement, self._settings.cores)}")

    def _make_log_dir(self) -> None:
        if self._settings.log_dir is None:
            self._log_dir = Path(tempfile.mkdtemp(prefix="sequoia-"))
        self._log_dir.mkdir(parents=True, exist_ok=True)

    def _fetch_weights(self) -> None:
        """Here and not only in the workers, whose progress nobody sees."""
        revision, cache_dir = (os.environ.get(name) or None for name in ("SEQUOIA_REVISION", "SEQUOIA_CACHE_DIR"))
        for model in dict.fromkeys(self._settings.models.values()):
            if model == MODEL_FREE and model != self._settings.target:
                continue
            files = resolve(model, revision=revision, cache_dir=Path(cache_dir) if cache_dir else None)
            self._steps.say(f"weights of {model}: {files.directory}")

    def _start_redis(self) -> None:
        if not self.redis_url:
            from sequoia.cli.redis import EmbeddedRedis

            with self._steps.step("starting Redis"):
                self.redis_url = self._stack.enter_context(EmbeddedRedis()).url

    def _start_workers(self) -> None:
        models = self._settings.models
        doing = "loading " + " and ".join(f"{model} to {name}" for name, model in models.items())
        with self._steps.step(doing) as on_progress:
            if self.placement == "colocated":
                self._start_colocated(on_progress)
            else:
                self._start_split(on_progress)
        for name, address in self.addresses.items():
            self._steps.say(f"  {name} serves on {address}")

    def _start_colocated(self, on_progress: Progress) -> None:
        """All in one process; the workers have sockets, too, in a folder that nobody else may enter."""
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sequoia-"))
        self.addresses = {name: f"unix:{folder}/{name}" for name in self._settings.models}
        flags: dict[str, object] = {}
        for name, address in self.addresses.items():
            own = {**self._settings.worker_flags(name), "listen": address}
            flags |= {f"{FLAG_PREFIX[name]}-{flag}": value for flag, value in own.items()}
        flags |= {f"coordinator-{flag}": value for flag, value in self._coordinator_flags().items()}
        num_threads, secrets = self._settings.num_threads_of("verify"), {"SEQUOIA_REDIS": self.redis_url}
        program = _Program("sequoia.cli.colocated", flags, num_threads, secrets=secrets, service=_COORDINATOR)
        self._start({"system": program}, on_progress)

    def _start_split(self, on_progress: Progress) -> None:
        settings = self._settings
        self._start(
            {
                name: _Program(
                    f"{name}_worker.server",
                    settings.worker_flags(name),
                    settings.num_threads_of(name),
                    settings.cores.get(name, ()),
                )
                for name in settings.models
            },
            on_progress,
        )
        self.addresses = {name: self.processes[name].address for name in settings.models}

    def _coordinator_flags(self) -> dict[str, object]:
        return {"listen": self._settings.listen, "draft": "", **self.addresses}

    def _start_coordinator(self) -> None:
        if self.placement == "colocated":
            return
        secrets = {"SEQUOIA_REDIS": self.redis_url}
        num_threads = self._settings.num_threads or num_cores()
        program = _Program("coordinator.server", self._coordinator_flags(), num_threads, secrets=secrets)
        with self._steps.step("starting the coordinator") as on_progress:
            self._start({"coordinator": program}, on_progress)

    def _start_gateway(self) -> None:
        if self._settings.http_port is not None:
            flags = {"address": self.address, "listen": f"127.0.0.1:{self._settings.http_port}", "grace-seconds": 5}
            with self._steps.step("starting the gateway") as on_progress:
                self._start({"gateway": _Program("coordinator.gateway", flags, 1)}, on_progress)

    def _start(self, programs: Mapping[str, _Program], on_progress: Progress) -> None:
        """Start servers, all at a time, and wait until they serve."""
        started: list[ServerProcess] = []
        self._stack.callback(stop, started)
        for name, each in programs.items():
            environment = {**_environment(each.num_threads), **each.secrets}
            started.append(
                ServerProcess(name, each.module, each.flags, environment, self._log_dir, each.cores, each.service)
            )
        for process in wait_until_serving(started, on_progress):
            self._steps.say(f"  process {process.pid} is {process.name}")
        self.processes.update((process.name, process) for process in started)


def _environment(num_threads: int) -> dict[str, str]:
    """For two workers that take turns on the same cores, with weights in huge pages.

    An idle thread spins for well under a millisecond: long enough for the barriers inside a forward, short enough not
    to take a core from the other worker. Sleeping at once (OMP_WAIT_POLICY=passive) makes forwards half as long again.
    """
    ours = {"OMP_NUM_THREADS": str(num_threads), "GOMP_SPINCOUNT": "10000", "THP_MEM_ALLOC_ENABLE": "1"}
    return {**os.environ, **ours}
