"""A model's forwards, each timed right after what the machine itself reaches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from sequoia.engine.attention import tree_segment
from sequoia.engine.decoders import Arithmetic, build_decoder
from sequoia.engine.forward_cost import forward_cost
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVCache, KVSlot
from sequoia.engine.machine_speed import Speed, matrix_product, stream_read
from sequoia.engine.model import LoadedModel, load_model
from sequoia.engine.sources import resolve
from sequoia.errors import InvalidArgument
from sequoia.roofline import ForwardCost, Roof, Sample
from sequoia.topology import TokenTree, Topology

_QUANTIZED_BITS = {"int8": 8, "int4": 4}

Progress = Callable[[int, int], None]  # (parts done, parts in all)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model ready to be timed behind a context."""

    model: LoadedModel
    arithmetic: Arithmetic
    decoder_name: str
    engine: Engine
    num_context_tokens: int
    cost: ForwardCost


def load_subject(
    reference: str, arithmetic: Arithmetic, *, dtype: str, num_context_tokens: int, max_tokens: int
) -> Subject:
    """The model by reference, with KV memory for the context and a forward of `max_tokens` behind it.

    Raises InvalidArgument naming `context` where that is more than the model takes, and as load_model and forward_cost.
    """
    torch.set_num_threads(arithmetic.num_threads)
    files = resolve(reference)
    model = load_model(files, dtype=dtype, device="auto", engine=arithmetic.engine)
    longest = model.context_length - max_tokens
    if num_context_tokens > longest:
        raise InvalidArgument(f"is {num_context_tokens}; with {reference} it must be at most {longest}", "context")
    num_layers = model.module.config.get_text_config().num_hidden_layers
    num_rows = num_context_tokens + max_tokens
    cost = _cost(model, arithmetic.quantization, num_context_tokens)
    decoder = build_decoder(model, arithmetic, num_rows, files.cache_dir)
    engine = Engine(decoder, KVCache(num_layers, 1, num_rows), model.device, model.dtype)
    return Subject(model, arithmetic, decoder.name, engine, num_context_tokens, cost)


def _cost(model: LoadedModel, quantization: str, num_context_tokens: int) -> ForwardCost:
    value_bytes = model.dtype.itemsize
    weight_bits = _QUANTIZED_BITS.get(quantization, 8 * value_bytes)
    return forward_cost(
        model.module.config,
        weight_bits=weight_bits,
        value_bytes=value_bytes,
        num_context_tokens=num_context_tokens,
        num_logits=model.vocabulary.num_known if model.vocabulary else None,
    )


@torch.inference_mode()
def measure(
    subjects: Sequence[Subject], widths: Sequence[int], num_rounds: int, on_progress: Progress
) -> list[list[Sample]]:
    """By subject: in each round a sample of each width, all of them in turn, so that a neighbour hits all alike.

    The round before the first is not counted: kernels are chosen in it.
    """
    samples: list[list[Sample]] = [[] for _ in subjects]
    with ExitStack() as stack:
        read = stream_read(subjects[0].model.device)
        take = [stack.enter_context(_sampling(subject, read)) for subject in subjects]
        for num_done in range(num_rounds + 1):
            on_progress(num_done, num_rounds)
            for found, sample in zip(samples, take, strict=True):
                found += [sample(num_tokens) for num_tokens in widths]
    return [found[len(widths) :] for found in samples]


@contextmanager
def _sampling(subject: Subject, read: Speed) -> Iterator[Callable[[int], Sample]]:
    multiply = matrix_product(subject.model)
    with subject.engine.cache.slot() as slot:
        _forward_seconds(subject.engine, slot, 1)  # allocates what the context is then pretended in
        slot.pretend(subject.num_context_tokens)
        yield lambda num_tokens: Sample(
            num_tokens, Roof(read(), multiply()), _forward_seconds(subject.engine, slot, num_tokens)
        )


def _forward_seconds(engine: Engine, slot: KVSlot, num_tokens: int) -> float:
    """As a chain of that size is verified: with the logits of every node."""
    segment = tree_segment(slot, (), TokenTree(Topology.chain(num_tokens), (0,) * num_tokens))
    started = time.perf_counter()
    [logits] = engine.forward([segment])
    float(logits[0, 0])  # waits for the device
    return time.perf_counter() - started
