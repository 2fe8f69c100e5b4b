"""Linear layers in int8 for draft models on CPU."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from sequoia.errors import InvalidArgument

# One bit less for activations: without it the 16-bit sums of CPUs that lack VNNI overflow.
_REDUCE_RANGE = True
_TINY = torch.finfo(torch.float32).tiny


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, scaled per output row and held packed, and int8 activations.

    Activations are scaled by their own row, but the kernel's zero point comes from the whole input, so **a row's result
    depends on the rows beside it**: good for a draft, never for a target, whose distribution must not depend on the
    tree.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp_min(_TINY) / 127
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():
            # torch 2.13 announces the end of these tensors, and has nothing else that feeds this kernel.
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self._bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, rows: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features), same dtype
        """The product; no rows give no rows, which the kernel itself refuses."""
        if rows.numel() == 0:
            return rows.new_empty((*rows.shape[:-1], self.out_features))
        # The kernel has one scale for all rows: without this one outlier token rounds all the others to nothing.
        wide = rows.float()
        largest = torch.linalg.vector_norm(wide, torch.inf, -1, keepdim=True).clamp_(min=_TINY)
        output = torch.ops.quantized.linear_dynamic(wide / largest, self._packed, _REDUCE_RANGE).mul_(largest)
        return (output if self._bias is None else output.add_(self._bias)).to(rows.dtype)


def check_int8(device: torch.device) -> None:
    """Raises InvalidArgument naming `quantization` where int8 cannot run."""
    if torch.backends.quantized.engine == "none":
        raise InvalidArgument("this build of torch has no int8 kernels; use none", "quantization")
    if device.type != "cpu":
        raise InvalidArgument("int8 runs on the CPU only; use none, or --device cpu", "quantization")


def quantize_int8(module: nn.Module) -> None:
    """Replace every nn.Linear in `module` (on CPU, not itself one) by an Int8Linear, the head included.

    A tied embedding keeps its own float weight. Experts that are not nn.Linear stay as they are. Raises
    InvalidArgument naming `quantization` where int8 cannot run.
    """
    linears = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    for _, layer in linears:
        check_int8(layer.weight.device)
    for name, layer in linears:
        module.set_submodule(name, Int8Linear(layer))
