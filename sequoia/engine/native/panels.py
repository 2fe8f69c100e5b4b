"""Weights as the C engine reads them: panels of 32 outputs, in huge pages."""

from __future__ import annotations

import ctypes
import mmap
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sequoia.engine.weights import LinearWeights

_PANEL = 32
_HUGE_PAGE = 2 << 20
# Inputs that share a scale. Four bits need a finer one; eight with groups this size add 1.6 % to the weights.
_GROUPS = {8: (128, 64, 32), 4: (32,)}
_KINDS = {16: 0, 8: 1, 4: 2}  # as in decoder.c
# Clipping the largest weights of a group of 4 bits a little makes all others more exact.
_CLIPPINGS = (1.0, 0.95, 0.9, 0.85, 0.8)


class Linear(ctypes.Structure):
    """`Linear` of decoder.c."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("activation_bits", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class Panels(NamedTuple):
    """A linear layer packed."""

    weights: Tensor  # (panels, ...) as in decoder.h
    scales: Tensor | None
    bias: Tensor | None


class PanelForm(NamedTuple):
    """What is known of a packed linear layer without its weights."""

    inputs: int
    outputs: int
    bits: int

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        sizes = _GROUPS.get(self.bits, ())
        return next((size for size in sizes if self.inputs % size == 0), self.inputs)

    def describe(self, panels: Panels, activation_bits: int) -> Linear:
        """To the C engine. The panels must outlive it."""
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in panels]
        return Linear(_KINDS[self.bits], activation_bits, self.inputs, self.outputs, self.group, 0, *addresses)


def fits(inputs: int) -> bool:
    """Whether a linear layer with so many inputs can be packed."""
    return inputs % 32 == 0


def pack(weights: LinearWeights, bits: int) -> Panels:
    """16 bits: bfloat16 as they are. 8 or 4: rounded to integers with one bfloat16 scale a group of inputs.

    In any order of memory: what is described must be contiguous, as `in_memory` and files have it.
    """
    form = form_of(weights, bits)
    padding = -form.outputs % _PANEL
    # Without padding it would be a copy.
    padded = pad(weights.weight, (0, 0, 0, padding)) if padding else weights.weight
    packed, scales = (_bfloat16_panels(padded), None) if bits == 16 else _integer_panels(padded, bits, form.group)
    return Panels(packed, scales, None if weights.bias is None else pad(weights.bias.float(), (0, padding)))


def form_of(weights: LinearWeights, bits: int) -> PanelForm:
    """That of these weights, packed."""
    outputs, inputs = weights.weight.shape
    return PanelForm(inputs, outputs, bits)


def in_memory(panels: Panels) -> Panels:
    """A copy in huge pages."""
    weights, scales, bias = panels
    return Panels(in_huge_pages(weights), None if scales is None else in_huge_pages(scales), bias)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """(outputs, inputs) float32: what the packed weights stand for."""
    outputs, inputs = weight.shape
    group = next(size for size in _GROUPS[bits] if inputs % size == 0)
    integers, scales = _quantized(weight, bits, group)
    return (integers * scales.float()[..., None]).reshape(outputs, inputs)


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy that is read at full bandwidth: with pages of 4 kB a forward spends its time looking them up."""
    size = tensor.numel() * tensor.element_size()
    # Private: Python's default is shared memory, for which most systems have no huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, -(-max(size, 1) // _HUGE_PAGE) * _HUGE_PAGE, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel())
    return copy.view(tensor.shape).copy_(tensor)


def _bfloat16_panels(weight: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    return weight.view(outputs // _PANEL, _PANEL, inputs // 2, 2).permute(0, 2, 1, 3)


def _integer_panels(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    outputs, inputs = weight.shape
    integers, scales = _quantized(weight, bits, group)
    unsigned = (integers + (1 << (bits - 1))).to(torch.uint8)
    words = unsigned.view(outputs // _PANEL, _PANEL, inputs // 4, 4).permute(0, 2, 1, 3)
    if bits == 4:
        pairs = words.unflatten(1, (inputs // 8, 2))
        words = pairs[:, :, 0] | (pairs[:, :, 1] << 4)
    return words, scales.view(outputs // _PANEL, _PANEL, inputs // group).permute(0, 2, 1)


def _quantized(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Integers (outputs, groups, group) as float32, and bfloat16 scales (outputs, groups)."""
    groups = weight.float().unflatten(1, (-1, group))
    if bits == 8:
        scales = (groups.abs().amax(-1) / 127).bfloat16()
        return _divided(groups, scales).clamp_(-127, 127), scales
    # The value of the largest magnitude falls on -8, which has no positive counterpart.
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0] / -8
    best, best_error = largest.bfloat16(), torch.full_like(largest, torch.inf)
    for clipping in _CLIPPINGS:
        scales = (largest * clipping).bfloat16()
        errors = (_divided(groups, scales).clamp_(-8, 7) * scales.float()[..., None] - groups).square().sum(-1)
        best = torch.where(errors < best_error, scales, best)
        best_error = torch.minimum(errors, best_error)
    return _divided(groups, best).clamp_(-8, 7), best


def _divided(groups: Tensor, scales: Tensor) -> Tensor:
    divisor = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    return (groups / divisor[..., None]).round_()
