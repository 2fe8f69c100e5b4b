"""A device that holds its numbers and shows them to nobody, but by a copy that is counted.

It computes on the CPU, so results can be compared; torch takes its tensors for `meta` ones. What a CUDA device would
wait for, or silently do with a wait, is an error here: `.item()`, a bool, a mask as an index, a tensor made of Python
numbers, an upload that is not asynchronous, a host tensor among the device's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_LOOKS = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "equal", "allclose"}
_COPIES = {"to", "_to_copy"}


class HiddenWait(AssertionError):
    """The host would have waited for the device."""


class Held(Tensor):
    """A tensor on the device; `near` are its numbers."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Held:
        held = torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
        )
        held.near = near
        return held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise HiddenWait(f"{func} outside of the device's context")


class PretendDevice(TorchDispatchMode):
    """While it is entered, `meta` is the device. Counts the copies either way."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = self.num_uploads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        is_here = any(isinstance(each, Held) for each in tensors)
        name = func._schema.name.removeprefix("aten::")
        if any(each.device == DEVICE and not isinstance(each, Held) for each in tensors):
            raise HiddenWait(f"{name}: a tensor was made on the device from Python numbers")
        device = kwargs.get("device")
        if name in _COPIES and device is not None:
            return self._copied(args[0], device, kwargs)
        if name == "copy_":
            return self._copied_into(args[0], args[1], any(args[2:]) or kwargs.get("non_blocking", False))
        if is_here:
            self._check(name, tensors)
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        near_args, near_kwargs = tree_map(_near, (args, kwargs))
        found = func(*near_args, **near_kwargs)
        if args and isinstance(args[0], Held) and found is args[0].near:
            return args[0]
        on_device = is_here if device is None else torch.device(device) == DEVICE
        return tree_map(_held, found) if on_device else found

    def _check(self, name: str, tensors: list[Tensor]) -> None:
        if name in _LOOKS or name.startswith("unique"):
            raise HiddenWait(f"{name} looks at a number")
        if any(not isinstance(each, Held) and each.dim() for each in tensors):
            raise HiddenWait(f"{name} has a host tensor among the device's")
        if name.startswith("index") and any(each.dtype == torch.bool for each in tensors[1:]):
            raise HiddenWait(f"{name} has a mask for an index")

    def _copied(self, source: Tensor, device: Any, kwargs: dict[str, Any]) -> Tensor:
        dtype = kwargs.get("dtype") or source.dtype
        if torch.device(device) == DEVICE:
            if isinstance(source, Held):
                return Held(source.near.to(dtype))
            self._count_upload(kwargs.get("non_blocking", False))
            return Held(source.to(dtype, copy=True))
        if not isinstance(source, Held):
            return source.to(dtype)
        self.num_reads += 1
        return source.near.to(dtype, copy=True)

    def _copied_into(self, target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        if isinstance(target, Held) and not isinstance(source, Held) and source.dim():
            self._count_upload(non_blocking)
        if isinstance(source, Held) and not isinstance(target, Held):
            self.num_reads += 1
        _near(target).copy_(_near(source))
        return target

    def _count_upload(self, non_blocking: bool) -> None:
        if not non_blocking:
            raise HiddenWait("an upload that is waited for")
        self.num_uploads += 1


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Held) else value


def _held(value: Any) -> Any:
    return Held(value) if isinstance(value, Tensor) else value
