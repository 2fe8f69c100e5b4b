"""One linear layer of the C engine by itself: for tests, and to measure its products."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sequoia.engine.native.panels import form_of, in_memory, pack
from sequoia.engine.native.scratch import Scratch, packed_words
from sequoia.engine.weights import LinearWeights


class NativeLinear:
    """(rows, inputs) float32 -> (rows, outputs) float32. The arguments are those of NativeDecoder."""

    def __init__(
        self, library: ctypes.CDLL, weights: LinearWeights, bits: int, activation_bits: int, *, num_threads: int
    ) -> None:
        self._multiply, self._num_threads = library.sequoia_linear, num_threads
        self._panels = in_memory(pack(weights, bits))
        self._linear = form_of(weights, bits).describe(self._panels, activation_bits)
        self._scratch = Scratch()

    def __call__(self, rows: Tensor) -> Tensor:
        """The product."""
        linear = self._linear
        rows = rows.contiguous()
        output = torch.empty(len(rows), linear.outputs)
        scratch = self._scratch.room(
            packed=packed_words(len(rows), linear.inputs),
            input_scales=len(rows) * linear.inputs // 32,
            input_sums=len(rows) * linear.inputs // 16,
            taken=self._num_threads,
        )
        self._multiply(
            ctypes.byref(linear),
            ctypes.byref(scratch),
            ctypes.c_void_p(rows.data_ptr()),
            ctypes.c_int32(len(rows)),
            ctypes.c_void_p(output.data_ptr()),
            ctypes.c_int32(self._num_threads),
        )
        return output
