"""A decoder's layers as the C engine reads them: packed, by name, wherever their memory is."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from torch import Tensor

from sequoia.engine.native.panels import Linear, PanelForm, Panels, pack
from sequoia.engine.weights import DecoderShape, LayerWeights

_LINEARS = ("qkv", "out", "gate_up", "down")
_NORMS = ("attention_norm", "mlp_norm", "query_norm", "key_norm", "attention_output_norm", "mlp_output_norm")


class Layer(ctypes.Structure):
    """`Layer` of decoder.h."""

    _fields_ = (
        *((name, Linear) for name in _LINEARS),
        *((name, ctypes.c_void_p) for name in (*_NORMS, "rotations", "keys", "values")),
        ("window", ctypes.c_int64),
    )


def pack_layer(layer: LayerWeights, bits: int) -> dict[str, Tensor]:
    """Its panels, their scales and biases, and its norms, those that it has."""
    linears = {name: pack(getattr(layer, name), bits)._asdict() for name in _LINEARS}
    tensors = {f"{name}.{part}": each for name, parts in linears.items() for part, each in parts.items()}
    tensors |= {name: getattr(layer, name) for name in _NORMS}
    return {name: each for name, each in tensors.items() if each is not None}


class LayerForms:
    """Of all layers of a model: what their tensors mean."""

    def __init__(self, shape: DecoderShape, bits: int, activation_bits: int) -> None:
        attended = shape.num_heads * shape.head_size
        sizes = {
            "qkv": (shape.hidden, attended + 2 * shape.num_kv_heads * shape.head_size),
            "out": (attended, shape.hidden),
            "gate_up": (shape.hidden, 2 * shape.intermediate),
            "down": (shape.intermediate, shape.hidden),
        }
        self._forms = {name: PanelForm(*size, bits) for name, size in sizes.items()}
        self._activation_bits = activation_bits
        self.widest = max(form.outputs for form in self._forms.values())
        self.longest = max(form.inputs for form in self._forms.values())

    def point(self, layer: Layer, tensors: Mapping[str, Tensor]) -> None:
        """Make a layer read these tensors, of `pack_layer` and contiguous, which must outlive its use."""
        for name, form in self._forms.items():
            panels = Panels(tensors[f"{name}.weights"], tensors.get(f"{name}.scales"), tensors.get(f"{name}.bias"))
            setattr(layer, name, form.describe(panels, self._activation_bits))
        for name in _NORMS:
            norm = tensors.get(name)
            setattr(layer, name, None if norm is None else norm.data_ptr())
