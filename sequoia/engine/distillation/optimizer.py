"""What turns slopes into steps: Muon for the layers' matrices, AdamW for all else."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

_BETAS = (0.9, 0.95)
_MOMENTUM = 0.95
_WEIGHT_DECAY = 0.01
_LONGEST_GRADIENT = 1.0


class Optimizer:
    """Of all parameters of a student that are to be trained.

    A matrix that maps hidden states to hidden states is moved by its momentum made orthogonal (Muon, Jordan et al.
    2024), as far as AdamW's step would go (Liu et al. 2025, arXiv 2502.16982), so that both share a learning rate. The
    head and vectors are AdamW's.
    """

    def __init__(self, student: PreTrainedModel) -> None:
        self._parameters = {name: each for name, each in student.named_parameters() if each.requires_grad}
        head = student.get_output_embeddings().weight
        matrices = [each for each in self._parameters.values() if each.ndim == 2 and each is not head]
        others = [each for each in self._parameters.values() if each.ndim != 2 or each is head]
        self._parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.AdamW(others, lr=0.0, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True),
            torch.optim.Muon(
                matrices, lr=0.0, weight_decay=_WEIGHT_DECAY, momentum=_MOMENTUM, adjust_lr_fn="match_rms_adamw"
            ),
        )
        self._states = {each: part.state for part in self._parts for each in part.param_groups[0]["params"]}

    def step(self, rate: float) -> None:
        """One step at that learning rate along the slopes, which are used up."""
        clip_grad_norm_(self._parameters.values(), _LONGEST_GRADIENT)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """All that later steps depend on beside the parameters, by name."""
        for name, parameter in self._parameters.items():
            for key, value in self._states[parameter][parameter].items():
                yield f"{key}.{name}", value

    def restore(self, name: str, value: Tensor) -> None:
        """What `state` gave by that name."""
        key, _, of = name.partition(".")
        parameter = self._parameters[of]
        self._states[parameter][parameter][key] = value.to(parameter.device)
