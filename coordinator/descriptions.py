"""What a worker may say of itself: bounded before any of it is kept, logged or planned with."""

from __future__ import annotations

from collections.abc import Iterator

from sequoia.errors import FailedPrecondition
from sequoia.v1 import worker_pb2

# Far beyond what any worker of ours says.
_MOST_CHARACTERS = 4096
_MOST_CURVES, _MOST_POINTS, _WIDEST = 1024, 4096, 2**20
_MOST_RULES = 64
# Ids fit into 31 bits, and a draft without a model says that it knows them all.
_MOST_TOKENS = 2**31
_LARGEST_TREE = 2**16
_MOST_SLOTS = 2**20
_MOST_TEMPLATE_CHARACTERS = 2**20
_MOST_ENDS, _MOST_SPECIAL_TOKENS = 4096, 1024

_TEXTS = (
    "instance_id",
    "model",
    "model_revision",
    "dtype",
    "quantization",
    "tokenizer_hash",
    "hardware_key",
    "device_id",
)
_NUMBERS = {
    "vocab_size": _MOST_TOKENS,
    "padded_vocab_size": _MOST_TOKENS,
    "context_length": _MOST_TOKENS,
    "max_tree_size": _LARGEST_TREE,
    "num_slots": _MOST_SLOTS,
}


def check_description(response: worker_pb2.DescribeResponse) -> None:
    """Raises FailedPrecondition naming what no worker says. The tokenizer's file is bounded by its message."""
    for name in (*_beyond(response.worker), *_beyond_tokenizer(response.tokenizer)):
        raise FailedPrecondition(f"its description has a {name} that no worker has; is it of this version?", "worker")


def _beyond(worker: worker_pb2.WorkerDescription) -> Iterator[str]:
    """Fields that are too long or too large."""
    yield from (name for name in _TEXTS if len(getattr(worker, name)) > _MOST_CHARACTERS)
    yield from (name for name, most in _NUMBERS.items() if getattr(worker, name) > most)
    if len(worker.rules) > _MOST_RULES:
        yield "rules"
    if len(worker.latencies) > _MOST_CURVES or any(map(_is_beyond, worker.latencies[:_MOST_CURVES])):
        yield "latencies"


def _is_beyond(curve: worker_pb2.LatencyCurve) -> bool:
    if max(len(curve.num_tokens), len(curve.seconds)) > _MOST_POINTS or curve.num_sessions > _MOST_SLOTS:
        return True
    return max(curve.num_tokens, default=0) > _WIDEST or curve.num_context_tokens > _MOST_TOKENS


def _beyond_tokenizer(files: worker_pb2.TokenizerFiles) -> Iterator[str]:
    if len(files.chat_template) > _MOST_TEMPLATE_CHARACTERS:
        yield "chat_template"
    if len(files.eos_token_ids) > _MOST_ENDS:
        yield "eos_token_ids"
    texts = files.special_tokens
    if len(texts) > _MOST_SPECIAL_TOKENS or any(len(k) + len(v) > _MOST_CHARACTERS for k, v in texts.items()):
        yield "special_tokens"
