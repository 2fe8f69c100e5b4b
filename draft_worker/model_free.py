"""A draft worker without a model: what it says of itself, and an engine whose forwards are nothing."""

from __future__ import annotations

import secrets
from pathlib import Path

import torch
from torch import Tensor

from sequoia.config import MODEL_FREE, num_cores
from sequoia.engine.attention import PackedBatch
from sequoia.engine.executor import Executor
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.sources import default_cache_dir
from sequoia.loaded_worker import Worker, device_id, start_worker
from sequoia.rules import RULES
from sequoia.v1 import worker_pb2
from sequoia.wire import rule_to_wire
from sequoia.worker_config import WorkerConfig

# It reads ids and never looks behind them: any vocabulary and any context of a target fit.
_VOCAB_SIZE = 2**31
_CONTEXT_LENGTH = 2**20
# Of what it does with them: a worker that finds other trees has another plan.
_REVISION = "1"


class NoModel:
    """A decoder without layers: no rows, and one logit a token that says nothing."""

    name = MODEL_FREE
    rows_are_independent = True
    grow = None
    make_target = None
    hidden_rows = None
    logits = None

    def attach(self, cache: KVCache) -> None:
        """Nothing: there are no layers."""

    def forward(self, batch: PackedBatch, cache: KVCache) -> Tensor:
        """(wanted tokens, 1)."""
        return torch.zeros(sum(len(segment.logit_tokens) for segment in batch.segments), 1)


def start(config: WorkerConfig, role: worker_pb2.WorkerRole, executor: Executor) -> Worker:
    """Load the model that the settings name, if it is one. Runs on the engine's thread."""
    return (
        _start_model_free(config, role, executor)
        if config.model == MODEL_FREE
        else start_worker(config, role, executor)
    )


def _start_model_free(config: WorkerConfig, role: worker_pb2.WorkerRole, executor: Executor) -> Worker:
    cpu, num_threads = torch.device("cpu"), config.num_threads or num_cores()
    executor.engine = Engine(NoModel(), KVCache(0, config.num_slots, _CONTEXT_LENGTH), cpu, torch.float32)
    description = worker_pb2.WorkerDescription(
        instance_id=secrets.token_hex(8),
        role=role,
        model=MODEL_FREE,
        model_revision=_REVISION,
        dtype="none",
        quantization="none",
        vocab_size=_VOCAB_SIZE,
        padded_vocab_size=_VOCAB_SIZE,
        context_length=config.context_length or _CONTEXT_LENGTH,
        max_tree_size=config.max_tree_size,
        rules=[rule_to_wire(rule) for rule in RULES.values()],
        hardware_key=f"cpu-{torch.backends.cpu.get_cpu_capability()}/{num_threads} threads/none/none/{MODEL_FREE}",
        num_slots=config.num_slots,
        device_id=device_id(cpu),
    )
    cache_dir = Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()
    return Worker(None, executor, description, config.prefill_chunk, cache_dir, "off", tree_rows=0, mixes_ngrams=False)
