"""What of a worker's memory is left for layers, once everything else has its own."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sequoia.engine.decoders import BITS
from sequoia.engine.model import LoadedModel, free_bytes
from sequoia.engine.weights import DecoderShape
from sequoia.process_memory import anonymous_bytes

# Of an interpreter that serves, beside what is counted here: stacks, messages, what allocators keep.
_SPARE_BYTES = 128 << 20
# Without a limit, what is left to the rest of the machine.
_SHARE_OF_FREE = 0.9
_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Demands:
    """What a worker keeps beside its layers."""

    num_cache_rows: int  # of keys and values
    num_forward_tokens: int  # most in a forward
    num_logits: int  # most tokens whose logits are in memory


def bytes_for_layers(model: LoadedModel, quantization: str, demands: Demands, limit: int, shape: DecoderShape) -> int:
    """Of `limit` bytes for the whole process on the model's device, 0: of what is free. Negative where the rest alone
    is too much.
    """
    is_host = model.device.type == "cpu"
    held = (anonymous_bytes(os.getpid()) or 0) if is_host else 0
    if not limit:
        limit = held + int((free_bytes(model.device) or 0) * _SHARE_OF_FREE)
    itemsize = model.dtype.itemsize
    cached = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * itemsize * demands.num_cache_rows
    head = model.padded_vocab_size * shape.hidden * min(8 * itemsize, BITS[quantization]) // 8
    # On the host it stays in its file, of which few rows are read.
    embedding = 0 if is_host else model.padded_vocab_size * shape.hidden * itemsize
    # Of a token: the residual, the widest product, its input, that input packed.
    widest = 2 * shape.intermediate + 2 * shape.hidden
    working = _FLOAT32 * demands.num_forward_tokens * (shape.hidden + 2 * widest)
    logits = _FLOAT32 * demands.num_logits * model.padded_vocab_size
    return limit - held - cached - head - embedding - working - logits - _SPARE_BYTES
