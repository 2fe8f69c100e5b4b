"""A worker before it serves: its model in memory, its KV pool, and what it says of itself."""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sequoia.config import num_bytes, num_cores
from sequoia.engine.decoder import Decoder, TransformersDecoder
from sequoia.engine.decoders import Arithmetic, build_decoder, why_not_native
from sequoia.engine.executor import Executor
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.model import LoadedModel, load_model
from sequoia.engine.offload.budget import Demands, bytes_for_layers
from sequoia.engine.offload.decoder import build_offloaded
from sequoia.engine.offload.stream import BlockStream
from sequoia.engine.sources import ModelFiles, resolve
from sequoia.engine.tensor_parallel.mirrored import LeadingCache, LeadingDecoder
from sequoia.engine.tensor_parallel.ranks import Ranks, join
from sequoia.engine.tokenizer import TokenizerDescription
from sequoia.engine.tree_logits import MOST_ROWS
from sequoia.errors import InvalidArgument
from sequoia.rpc import announce_progress
from sequoia.rules import RULES
from sequoia.v1 import worker_pb2
from sequoia.wire import rule_to_wire
from sequoia.worker_config import WorkerConfig

_DEFAULT_CONTEXT_LENGTH = 8192
# That KV memory is enough for where nothing is said: shorter ones are the more.
_DEFAULT_WHOLE_SESSIONS = 4
# Verdicts that a draft session guesses at once, at most, with a tree ahead for each.
MOST_GUESSES = 3


@dataclass(frozen=True)
class Worker:
    """A loaded model behind its executor, and what it says of itself. Without a model there is no tokenizer."""

    tokenizer: TokenizerDescription | None
    executor: Executor
    description: worker_pb2.WorkerDescription
    prefill_chunk: int
    cache_dir: Path
    draft_ahead: str
    tree_rows: int  # KV rows that a session has for its trees, beside those of its tokens
    mixes_ngrams: bool
    stream: BlockStream[Any] | None = None  # what an offloaded model's layers come from
    ranks: Ranks | None = None  # this process among those that have the model together


def start_worker(config: WorkerConfig, role: worker_pb2.WorkerRole, executor: Executor) -> Worker:
    """Load the model and allocate the KV pool. Runs on the engine's thread."""
    num_threads = config.num_threads or max(1, num_cores() // config.tensor_parallel)
    torch.set_num_threads(num_threads)
    files = resolve(config.model, revision=config.revision or None, cache_dir=config.cache_dir or None)
    is_draft = role == worker_pb2.WORKER_ROLE_DRAFT
    ranks = join(config.tensor_parallel, config.device) if config.tensor_parallel > 1 else None
    model = _load_model(config, files, config.offload, ranks)
    if is_draft and model.checkpoint is not None and why_not_native(model, files.cache_dir):
        # Packed by torch, layers would be in memory twice for good.
        model = _load_model(config, files, "none")
    context_length = _context_length(config, model)
    if model.vocabulary and not is_draft:
        reason = f"proposes {model.vocabulary.num_known} of {model.vocabulary.size} tokens, so it can only be a draft"
        raise InvalidArgument(f"{model.reference} {reason}", "model")
    quantization = _quantization(config, model, is_draft=is_draft)
    arithmetic = Arithmetic(
        engine=_engine(config),
        quantization=quantization,
        is_draft=is_draft,
        deterministic=config.deterministic,
        num_threads=num_threads,
    )
    tree_rows = config.max_tree_size * _num_trees(config, role)
    slot_rows = context_length + tree_rows
    num_layers = model.module.config.get_text_config().num_hidden_layers
    kv_tokens = _kv_tokens(config, slot_rows)
    new_cache = partial(LeadingCache, ranks) if ranks and ranks.leads else KVCache
    cache = new_cache(num_layers, config.num_slots, slot_rows, kv_tokens, reuses=config.prefix_reuse == "on")
    if model.checkpoint is None:
        decoder, stream = build_decoder(model, arithmetic, slot_rows, files.cache_dir), None
    else:
        num_logits = min(config.max_tree_size, MOST_ROWS)
        demands = Demands(cache.num_rows, config.prefill_chunk + config.max_tree_size, num_logits)
        room = partial(bytes_for_layers, model, quantization, demands, num_bytes(config.memory_limit or "0"))
        decoder, stream = build_offloaded(
            model,
            arithmetic,
            slot_rows,
            files.cache_dir,
            room,
            tier="disk" if model.device.type == "cpu" else "host",
            num_resident=None if config.resident_layers < 0 else config.resident_layers,
            on_progress=announce_progress,
        )
        if is_draft and not stream.is_resident:
            problem = f"{stream.num_resident} of the draft's {stream.num_blocks} layers fit into memory"
            raise InvalidArgument(f"{problem}, and all must; choose a smaller draft", "model")
    if ranks and ranks.leads:
        assert isinstance(decoder, TransformersDecoder), "no other runs in ranks"
        decoder = LeadingDecoder(decoder, ranks)
    executor.engine = Engine(decoder, cache, model.device, model.dtype, vocabulary=model.vocabulary)
    description = worker_pb2.WorkerDescription(
        instance_id=secrets.token_hex(8),
        role=role,
        model=model.reference,
        model_revision=model.revision,
        dtype=model.dtype_name,
        quantization=quantization,
        tokenizer_hash=model.tokenizer.tokenizer_hash,
        vocab_size=min(model.tokenizer.vocab_size, model.padded_vocab_size),
        padded_vocab_size=model.padded_vocab_size,
        context_length=context_length,
        max_tree_size=config.max_tree_size,
        rules=[rule_to_wire(rule) for rule in RULES.values()],
        hardware_key=_hardware_key(model, quantization, num_threads, decoder, stream, config.tensor_parallel),
        num_slots=config.num_slots,
        kv_tokens=kv_tokens,
        device_id=device_id(model.device),
    )
    return Worker(
        model.tokenizer,
        executor,
        description,
        config.prefill_chunk,
        files.cache_dir,
        config.draft_ahead,
        tree_rows,
        mixes_ngrams=config.ngram == "on",
        stream=stream if stream and not stream.is_resident else None,
        ranks=ranks,
    )


def _kv_tokens(config: WorkerConfig, slot_rows: int) -> int:
    wanted = config.kv_tokens or min(config.num_slots, _DEFAULT_WHOLE_SESSIONS) * slot_rows
    if wanted < slot_rows:
        problem = f"{wanted} is less than the {slot_rows} that one session with a whole context and its trees may need"
        raise InvalidArgument(f"{problem}; raise it, or lower --context-length", "kv-tokens")
    return wanted


def _num_trees(config: WorkerConfig, role: worker_pb2.WorkerRole) -> int:
    """Trees that a session has rows for at a time: the last one, and those ahead, each with a leaf it hangs from."""
    is_ahead = role == worker_pb2.WORKER_ROLE_DRAFT and config.draft_ahead != "off"
    return 1 + MOST_GUESSES if is_ahead else 1


def _engine(config: WorkerConfig) -> str:
    return "transformers" if config.tensor_parallel > 1 else config.engine


def _quantization(config: WorkerConfig, model: LoadedModel, *, is_draft: bool) -> str:
    if config.quantization != "auto":
        return config.quantization
    if not is_draft or model.device.type != "cpu":
        return "none"
    if model.checkpoint is not None:
        # Beside a target that is read from disk, a level's time counts for less than the memory it takes.
        return "int4"
    # What is offloaded as a target is as a draft to be less than that.
    return "int8" if model.dtype == torch.bfloat16 or config.offload != "none" else "none"


def _load_model(config: WorkerConfig, files: ModelFiles, offload: str, ranks: Ranks | None = None) -> LoadedModel:
    return load_model(
        files,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        offload=offload,
        engine=_engine(config),
        ranks=ranks,
    )


def _context_length(config: WorkerConfig, model: LoadedModel) -> int:
    if config.context_length > model.context_length:
        longest = model.context_length
        raise InvalidArgument(f"{config.context_length} is more than the model's {longest} tokens", "context_length")
    return config.context_length or min(model.context_length, _DEFAULT_CONTEXT_LENGTH)


def device_id(device: torch.device) -> str:
    """Of this host and the device on it: two workers with the same one take turns."""
    if device.type == "cuda":
        name = str(torch.cuda.get_device_properties(device).uuid)
    else:
        boot_id = Path("/proc/sys/kernel/random/boot_id")
        host = boot_id.read_text() if boot_id.exists() else platform.node()
        name = f"{host} {sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else ''}"
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _hardware_key(
    model: LoadedModel,
    quantization: str,
    num_threads: int,
    decoder: Decoder,
    stream: BlockStream[Any] | None,
    num_ranks: int,
) -> str:
    if model.device.type == "cuda":
        place = torch.cuda.get_device_name(model.device)
    else:
        place = f"cpu-{torch.backends.cpu.get_cpu_capability()}/{num_threads} threads"
    independent = "/deterministic" * (decoder.rows_are_independent and decoder.name != "native")
    is_streamed = stream is not None and not stream.is_resident
    divided = f"/{num_ranks} ranks" if num_ranks > 1 else ""
    streamed = f"/{stream.num_resident} of {stream.num_blocks} layers in memory" if stream and is_streamed else ""
    return f"{place}/{model.dtype_name}/{quantization}/{decoder.name}{independent}{streamed}{divided}"
