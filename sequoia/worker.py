"""The chassis both workers share: measuring, the handshake, serving until told to stop."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvloop
from filelock import FileLock

from sequoia.addresses import is_local
from sequoia.border import error_border
from sequoia.credentials import server_credentials
from sequoia.engine.attention import chunk_segment
from sequoia.engine.executor import EngineThread, Executor, Job
from sequoia.engine.kv_cache import KVSlot
from sequoia.engine.offload.stream import BlockStream
from sequoia.engine.tensor_parallel.mirrored import follow
from sequoia.engine.tensor_parallel.ranks import Ranks
from sequoia.engine.warmup import measure_profile
from sequoia.errors import InvalidArgument
from sequoia.in_process import LocalServices
from sequoia.loaded_worker import Worker, start_worker
from sequoia.request_scope import request_scope
from sequoia.rpc import Server, running, stop_signal
from sequoia.tracing import OpenSpan, Tracing, traced, tracing_as_asked
from sequoia.v1 import worker_pb2, worker_pb2_grpc
from sequoia.wire import profile_to_wire
from sequoia.worker_config import WorkerConfig

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerKind:
    """What tells a draft worker from a verify worker."""

    role: worker_pb2.WorkerRole
    service: str
    traced_as: str  # its name in traces
    make_servicer: Callable[[Worker, Tracing | None], Any]
    add_to_server: Callable[[Any, Any], None]
    start: Callable[[WorkerConfig, worker_pb2.WorkerRole, Executor], Worker] = start_worker


def measure(worker: Worker) -> None:
    """Put the latency profile into the description. Runs on the engine's thread, with all its models loaded."""
    description = worker.description
    # Processes of one machine take turns, or each would measure the other.
    worker.cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(worker.cache_dir / "measuring.lock"):
        profile = measure_profile(
            worker.executor.engine,
            description.max_tree_size,
            description.context_length,
            verifies=description.role == worker_pb2.WORKER_ROLE_VERIFY,
            is_streamed=worker.stream is not None,
        )
    description.latencies.extend(profile_to_wire(profile))
    if worker.stream is not None:
        _LOG.info("offloaded: %s", worker.stream)


def session_limit(max_num_tokens: int, described: worker_pb2.WorkerDescription) -> int:
    """Committed tokens that a session has at most: as many as it was opened for, 0: as the context takes."""
    return min(max_num_tokens or described.context_length, described.context_length)


def feed(slot: KVSlot, token_ids: tuple[int, ...], chunk: int) -> Job[None]:
    """Chunked prefill: make rows for the tokens, `chunk` at a time, without logits."""
    for start in range(0, len(token_ids), chunk):
        part = token_ids[start : start + chunk]
        yield chunk_segment(slot, part, logits=False)
        slot.keep(range(len(part)))


@asynccontextmanager
async def session_border(context: Any, tracing: Tracing | None, name: str) -> AsyncIterator[OpenSpan | None]:
    """Around a session's handler: its errors, and what its log lines and its spans have of the request it is for."""
    with request_scope(context.invocation_metadata()):
        async with error_border(context):
            with traced(tracing, name) as span:
                _LOG.debug("session begins")
                yield span


async def _until_stopped(_: Mapping[str, LocalServices]) -> None:
    await stop_signal()


def serve(
    *hosted: tuple[WorkerKind, WorkerConfig],
    environ: Mapping[str, str],
    until: Callable[[Mapping[str, LocalServices]], Awaitable[None]] = _until_stopped,
) -> None:
    """Run workers, whose models share one thread, until SIGTERM or SIGINT, or while `until` runs, which gets to know
    their services by address and watches for the signals itself. OTEL_* of `environ` may ask for traces.

    Prints one JSON line with the address of each when all serve. Of several ranks only the first serves; the others end
    with it.
    """
    _check_ranks(hosted)
    for _, config in hosted:
        _check_credentials(config)  # before a model is loaded
    with ExitStack() as stack:
        tracings = [stack.enter_context(tracing_as_asked(kind.traced_as, environ)) for kind, _ in hosted]
        thread = stack.enter_context(EngineThread())
        workers = [_load(kind, config, thread) for kind, config in hosted]
        ranks = workers[0].ranks
        if ranks and not ranks.leads:
            _follow(workers[0], ranks)
            return
        for worker in workers:
            worker.executor.call(partial(measure, worker))
        uvloop.run(_serve(hosted, workers, tracings, until))
        if ranks:
            workers[0].executor.call(ranks.end)


def _check_ranks(hosted: Sequence[tuple[WorkerKind, WorkerConfig]]) -> None:
    if any(config.tensor_parallel > 1 for _, config in hosted):
        [(kind, _), *others] = hosted
        if others or kind.role != worker_pb2.WORKER_ROLE_VERIFY:
            raise InvalidArgument("it is for a verify worker in processes of its own", "tensor-parallel")


def _follow(worker: Worker, ranks: Ranks) -> None:
    # A launcher sends its signals to all ranks, and the first one has sessions to end before.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    worker.executor.call(partial(follow, ranks, worker.executor.engine))


def _check_credentials(config: WorkerConfig) -> None:
    """Raises InvalidArgument for what cannot be served with."""
    server_credentials(config.listen, config.tls)
    if config.tls_cert and not config.tls_ca and not is_local(config.listen):
        _LOG.warning("%s serves whoever reaches it; --tls-ca lets in those with a certificate", config.listen)


def _load(kind: WorkerKind, config: WorkerConfig, thread: EngineThread) -> Worker:
    verifies = kind.role == worker_pb2.WORKER_ROLE_VERIFY
    executor = Executor(thread, config.prefill_chunk + config.max_tree_size, lets_others_end=verifies)
    return executor.call(lambda: kind.start(config, kind.role, executor))


async def _serve(
    hosted: Sequence[tuple[WorkerKind, WorkerConfig]],
    workers: Sequence[Worker],
    tracings: Sequence[Tracing | None],
    until: Callable[[Mapping[str, LocalServices]], Awaitable[None]],
) -> None:
    servers: dict[Server, Sequence[str]] = {}
    services: dict[str, LocalServices] = {}
    for (kind, config), worker, tracing in zip(hosted, workers, tracings, strict=True):
        server = Server(config.listen, config.tls)
        services[config.listen] = LocalServices()
        worker_servicer, servicer = WorkerServicer(worker), kind.make_servicer(worker, tracing)
        for each in (server.grpc_server, services[config.listen]):
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker_servicer, each)
            kind.add_to_server(servicer, each)
        servers[server] = (kind.service, "sequoia.v1.WorkerService")
    async with running(servers):
        await until(services)


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Describes the worker and tells its present state."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def Describe(self, request: worker_pb2.DescribeRequest, context: Any) -> worker_pb2.DescribeResponse:
        """The description; the tokenizer's files when asked for."""
        async with error_border(context):
            response = worker_pb2.DescribeResponse(worker=self._worker.description)
            tokenizer = self._worker.tokenizer
            if request.include_tokenizer and tokenizer is not None:
                response.tokenizer.tokenizer_json = tokenizer.tokenizer_json
                response.tokenizer.chat_template = tokenizer.chat_template
                response.tokenizer.eos_token_ids.extend(tokenizer.eos_token_ids)
                response.tokenizer.special_tokens.update(tokenizer.special_tokens)
        return response

    async def GetStatus(self, request: worker_pb2.GetStatusRequest, context: Any) -> worker_pb2.GetStatusResponse:
        """Slots and forwards at this moment."""
        engine = self._worker.executor.engine
        return worker_pb2.GetStatusResponse(
            num_slots=engine.cache.num_slots,
            num_slots_used=engine.cache.num_slots_used,
            kv_tokens_used=engine.cache.memory.num_rows_used,
            num_reused_tokens=engine.cache.memory.num_reused,
            num_forwards=engine.num_forwards,
            num_forward_tokens=engine.num_forward_tokens,
            offload=_offload_status(self._worker.stream) if self._worker.stream else None,
        )


def _offload_status(stream: BlockStream[Any]) -> worker_pb2.OffloadStatus:
    passed = stream.passed
    return worker_pb2.OffloadStatus(
        num_layers=stream.num_blocks,
        num_resident_layers=stream.num_resident,
        num_forwards=passed.num_passes,
        num_bytes=passed.num_bytes,
        read_seconds=passed.read_seconds,
        forward_seconds=passed.pass_seconds,
        stall_seconds=passed.stall_seconds,
    )
