"""Which decoder runs a model on this machine: the C engine, CUDA graphs, lean torch, or the model's own modules."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sequoia.engine import determinism
from sequoia.engine.attention import TREE_ATTENTION, register, tree_attention
from sequoia.engine.decoder import Decoder, TransformersDecoder
from sequoia.engine.graphs_decoder import GraphsDecoder
from sequoia.engine.lean_decoder import LeanDecoder, Multiply, linear_module
from sequoia.engine.model import LoadedModel
from sequoia.engine.native.decoder import NativeDecoder, can_run
from sequoia.engine.native.library import NativeUnavailable, library
from sequoia.engine.offload.stream import BlockStream
from sequoia.engine.quantization import Int8Linear, check_int8, quantize_int8
from sequoia.engine.weights import DecoderWeights, LinearWeights, is_readable, read_shape, take_weights
from sequoia.errors import InvalidArgument

_LOG = logging.getLogger(__name__)
BITS = {"none": 16, "int8": 8, "int4": 4}
# Widths of the forwards that decide which product is quicker: a plain step, and a tree.
_TRIAL_WIDTHS = (1, 16)
_NUM_TRIALS = 5


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How a model is to be computed.

    engine: auto, native, graphs, lean or transformers; auto takes the first of them that can. quantization: none, int8
    or int4 weights; `is_draft` allows what makes the numbers a little coarser: 8 bits for the inputs of int8 and int4
    layers instead of 16. deterministic: a token's logits do not depend on what else is in the forward.
    """

    engine: str = "auto"
    quantization: str = "none"
    is_draft: bool = False
    deterministic: bool = False
    num_threads: int = 1


def build_decoder(model: LoadedModel, arithmetic: Arithmetic, num_positions: int, cache_dir: Path) -> Decoder:
    """A decoder with the weights of `model`, whose module is empty afterwards unless it is the decoder itself.

    `num_positions` is the longest sequence; compiled code is kept in `cache_dir`. Raises InvalidArgument naming
    `engine` or `quantization` for what this model or machine cannot do.
    """
    assert model.checkpoint is None, "a hollow model is decoded by `build_offloaded`"
    if arithmetic.engine == "transformers" or not is_readable(model.module):
        check_engine(model, arithmetic)
        return build_transformers(model, arithmetic)
    if arithmetic.engine in ("auto", "native") and not (reason := why_not_native(model, cache_dir)):
        weights = take_weights(model.module, num_positions)
        return NativeDecoder(
            library(cache_dir),
            weights,
            bits=BITS[arithmetic.quantization],
            activation_bits=16,
            num_threads=arithmetic.num_threads,
        )
    if arithmetic.engine == "native":
        raise InvalidArgument(f"native cannot run here: {reason}; use lean", "engine")
    reason = reason if arithmetic.engine == "auto" else f"{arithmetic.engine} was asked for"
    check_quantization(arithmetic, reason)
    _LOG.info("the native engine does not run", extra={"reason": reason})
    captures = _captures(model, arithmetic)
    lean = build_lean(model, arithmetic, take_weights(model.module, num_positions))
    return GraphsDecoder(lean, model.device) if captures else lean


def check_engine(model: LoadedModel, arithmetic: Arithmetic) -> None:
    """Raises InvalidArgument naming `engine` for one that does not know this kind of model."""
    if arithmetic.engine not in ("auto", "transformers") and not is_readable(model.module):
        kind = model.module.config.model_type
        raise InvalidArgument(f"{arithmetic.engine} does not know {kind} models; use transformers", "engine")


def _captures(model: LoadedModel, arithmetic: Arithmetic) -> bool:
    """Whether forwards become graphs: on a CUDA device, or when asked for. A row's company then has a say in it."""
    if arithmetic.engine == "graphs" and arithmetic.deterministic:
        raise InvalidArgument("graphs cannot be deterministic; use lean", "engine")
    return arithmetic.engine == "graphs" or (
        arithmetic.engine == "auto" and model.device.type == "cuda" and not arithmetic.deterministic
    )


def why_not_native(model: LoadedModel, cache_dir: Path) -> str:
    """What keeps the C engine from it; empty when the C engine runs this model."""
    if model.device.type != "cpu":
        return f"it runs on the CPU, and the model is on {model.device.type}"
    if not is_readable(model.module):
        return f"it does not know {model.module.config.model_type} models"
    if model.dtype != torch.bfloat16:
        return f"it computes in bfloat16, and the model is in {model.dtype_name}"
    if not can_run(read_shape(model.module)):
        return "a size of the model is not a multiple of its vectors"
    try:
        library(cache_dir)
    except NativeUnavailable as error:
        return str(error)
    return ""


def check_quantization(arithmetic: Arithmetic, reason: str) -> None:
    """What only the C engine can do without letting a row depend on the tree around it."""
    wanted = arithmetic.quantization
    if wanted == "int4" or (wanted == "int8" and not arithmetic.is_draft):
        why = reason and f", but {reason}"
        raise InvalidArgument(f"{wanted} needs the native engine{why}; use none", "quantization")


def build_transformers(model: LoadedModel, arithmetic: Arithmetic) -> TransformersDecoder:
    """The model's own modules."""
    check_quantization(arithmetic, "")
    register()
    determinism.register()
    name = determinism.DETERMINISTIC_ATTENTION if arithmetic.deterministic else TREE_ATTENTION
    model.module.set_attn_implementation(name)
    if arithmetic.quantization == "int8":
        quantize_int8(model.module)
    elif arithmetic.deterministic:
        determinism.make_deterministic(model.module)
    independent = arithmetic.deterministic and arithmetic.quantization == "none"
    return TransformersDecoder(model.module, rows_are_independent=independent)


def build_lean(
    model: LoadedModel, arithmetic: Arithmetic, weights: DecoderWeights, stream: BlockStream[Any] | None = None
) -> LeanDecoder:
    """Of weights in memory, or of layers that are streamed."""
    if arithmetic.quantization == "int8":
        check_int8(model.device)
        return LeanDecoder(
            weights, pack=lambda each: Int8Linear(linear_module(each)), attention=tree_attention, stream=stream
        )
    if arithmetic.deterministic:
        return LeanDecoder(
            weights,
            pack=lambda each: determinism.FixedRowsLinear(linear_module(each)),
            attention=determinism.deterministic_attention,
            rows_are_independent=True,
            stream=stream,
        )
    # What is packed once a forward must not be packed at a cost.
    pack = _plain if stream else _quickest_product(model, weights)
    return LeanDecoder(weights, pack=pack, attention=tree_attention, stream=stream)


def _quickest_product(model: LoadedModel, weights: DecoderWeights) -> Callable[[LinearWeights], Multiply]:
    """torch's own product or oneDNN's prepacked one, by trial on a matrix of the model's most frequent shape."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or not _prepacks_bfloat16():
        return _plain
    weight = torch.zeros(weights.shape.intermediate, weights.shape.hidden, dtype=model.dtype)
    trial = LinearWeights(weight, None)
    return min((_plain, _prepacked), key=lambda pack: _trial_seconds(pack(trial), weights.shape.hidden))


def _prepacks_bfloat16() -> bool:
    """oneDNN is there, and the CPU has what it needs for that: AVX-512, or AVX-NE-CONVERT."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _trial_seconds(multiply: Multiply, inputs: int) -> float:
    return sum(_quickest(partial(multiply, torch.zeros(rows, inputs, dtype=torch.bfloat16))) for rows in _TRIAL_WIDTHS)


def _quickest(function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_NUM_TRIALS):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _plain(weights: LinearWeights) -> Multiply:
    weight, bias = weights.weight.contiguous(), weights.bias
    return lambda rows: linear(rows, weight, bias)


def _prepacked(weights: LinearWeights) -> Multiply:
    packed = torch.ops.mkldnn._reorder_linear_weight(weights.weight.contiguous())

    def multiply(rows: Tensor) -> Tensor:
        if not len(rows):
            return rows.new_empty((0, packed.shape[0]))
        return torch.ops.mkldnn._linear_pointwise(rows, packed, weights.bias, "none", [], "")

    return multiply
