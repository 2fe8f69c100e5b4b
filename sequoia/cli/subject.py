"""A target in this very process, ready to run: for what is measured of a model and not of a system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coordinator.text import TextCodec
from sequoia.config import num_cores
from sequoia.engine.attention import tree_segment
from sequoia.engine.decoders import Arithmetic, build_decoder
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVCache, KVSlot
from sequoia.engine.model import load_model
from sequoia.engine.sources import resolve
from sequoia.engine.tokenizer import TokenizerDescription
from sequoia.topology import TokenTree
from sequoia.v1.worker_pb2 import TokenizerFiles

# Most tokens that are fed in one forward.
CHUNK = 256
# Sessions that there is KV memory for, beside one.
NUM_NEIGHBOURS = 3


@dataclass(frozen=True, slots=True)
class Subject:
    """A target, ready to run. A slot of its engine holds `context_length` tokens."""

    engine: Engine
    decoder_name: str
    codec: TextCodec
    vocab_size: int
    context_length: int


def load(
    model: str,
    *,
    dtype: str,
    device: str = "auto",
    engine: str = "auto",
    quantization: str = "none",
    deterministic: bool = False,
    context_length: int = 1024,
) -> Subject:
    """The model by reference, with KV memory for four sessions, none of them longer than the model's own context.

    Raises InvalidArgument naming `model`, `engine` or `quantization`.
    """
    torch.set_num_threads(num_cores())
    files = resolve(model)
    loaded = load_model(files, dtype=dtype, device=device, engine=engine)
    num_rows = min(context_length, loaded.context_length)
    num_layers = loaded.module.config.get_text_config().num_hidden_layers
    arithmetic = Arithmetic(engine, quantization, deterministic=deterministic, num_threads=num_cores())
    decoder = build_decoder(loaded, arithmetic, num_rows, files.cache_dir)
    runner = Engine(decoder, KVCache(num_layers, 1 + NUM_NEIGHBOURS, num_rows), loaded.device, loaded.dtype)
    return Subject(runner, decoder.name, codec_of(loaded.tokenizer), loaded.tokenizer.vocab_size, num_rows)


def codec_of(tokenizer: TokenizerDescription) -> TextCodec:
    """The codec that a coordinator makes of it."""
    return TextCodec.from_files(
        TokenizerFiles(
            tokenizer_json=tokenizer.tokenizer_json,
            chat_template=tokenizer.chat_template,
            eos_token_ids=tokenizer.eos_token_ids,
            special_tokens=tokenizer.special_tokens,
        )
    )


def prefill(engine: Engine, slot: KVSlot, tokens: Sequence[int]) -> None:
    """The tokens behind those that the slot holds, chunk by chunk."""
    for start in range(0, len(tokens), CHUNK):
        part = tuple(tokens[start : start + CHUNK])
        engine.forward([tree_segment(slot, part, TokenTree.root_only(0))])
        slot.keep(range(len(part)))
