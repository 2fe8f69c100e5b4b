"""The training: a student learns its target's distribution behind every token, step by step, and can be resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from sequoia.engine.distillation.batches import Batch, collate, grouped
from sequoia.engine.distillation.corpus import Document, Shard
from sequoia.engine.distillation.loss import HeadLoss
from sequoia.engine.draft_vocabulary import DraftVocabulary
from sequoia.errors import FailedPrecondition

_BETAS = (0.9, 0.95)
_WEIGHT_DECAY = 0.01
_LONGEST_GRADIENT = 1.0
_WARMUP_SHARE, _LAST_SHARE = 0.03, 0.03


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast: AdamW, a short warm-up, then a cosine down to 3 % of `learning_rate`."""

    num_steps: int
    batch_tokens: int = 4096
    learning_rate: float = 3e-3
    seed: int = 0

    def rate(self, step: int) -> float:
        """Of the step with that number, from 0."""
        warmup = max(1.0, _WARMUP_SHARE * self.num_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / self.num_steps))
        return self.learning_rate * min(1.0, (step + 1) / warmup) * (_LAST_SHARE + (1.0 - _LAST_SHARE) * cosine)


class Training:
    """A student being trained on shards of text. The same arguments take the same steps, resumed or not."""

    def __init__(
        self,
        student: PreTrainedModel,
        vocabulary: DraftVocabulary | None,
        shards: Sequence[Path],
        schedule: Schedule,
    ) -> None:
        self.student, self._vocabulary, self._shards, self.schedule = student, vocabulary, shards, schedule
        student.train().requires_grad_(True)
        self._parameters = dict(student.named_parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=0.0, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True
        )
        self.num_steps_done = 0

    def steps(self) -> Iterator[float]:
        """What is left of the schedule; yields every step's loss, in nats a token."""
        for number, documents in enumerate(self._groups()):
            if number == self.schedule.num_steps:
                return
            if number == self.num_steps_done:
                yield self._step(collate(documents).to(self.student.device))

    def save(self, path: Path) -> None:
        """A checkpoint, whole or not at all."""
        tensors = {f"student.{name}": each.detach() for name, each in self._parameters.items()}
        for name, parameter in self._parameters.items():
            state = self._optimizer.state[parameter]
            tensors |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, {"step": str(self.num_steps_done), "schedule": json.dumps(asdict(self.schedule))})
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises FailedPrecondition for one of another schedule."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata["schedule"] != json.dumps(asdict(self.schedule)):
                raise FailedPrecondition(
                    f"{path} is of another training ({metadata['schedule']}); name another --out, or remove it", "out"
                )
            self.num_steps_done = int(metadata["step"])
            for name, parameter in self._parameters.items():
                parameter.data.copy_(file.get_tensor(f"student.{name}"))
                state = {key: file.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
                state["step"] = torch.tensor(float(self.num_steps_done))
                self._optimizer.state[parameter] = {key: each.to(parameter.device) for key, each in state.items()}

    def _groups(self) -> Iterator[list[Document]]:
        """Batches without end, every document once an epoch, in an order that follows from the seed."""
        for epoch in count():
            generator = torch.Generator().manual_seed((self.schedule.seed << 20) + epoch)
            for index in torch.randperm(len(self._shards), generator=generator):
                documents = list(Shard.load(self._shards[index]).documents())
                yield from grouped(documents, self.schedule.batch_tokens, generator)

    def _step(self, batch: Batch) -> float:
        rate = self.schedule.rate(self.num_steps_done)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss = self._loss(batch)
        torch.autograd.backward(loss)
        clip_grad_norm_(self._parameters.values(), _LONGEST_GRADIENT)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.num_steps_done += 1
        return loss.item()

    def _loss(self, batch: Batch) -> Tensor:
        """Cross entropy in nats a token; p of tokens that the student does not know is nobody's to learn."""
        vocabulary, head = self._vocabulary, self.student.get_output_embeddings().weight
        is_token = batch.weights > 0.0
        hidden = hidden_states(self.student, vocabulary, batch.token_ids)[is_token]
        ids, p = batch.teacher_ids[is_token], batch.teacher_p[is_token]
        num_known = len(head)
        if vocabulary is not None:
            num_known, ids = vocabulary.num_known, vocabulary.rows[ids]
            is_known = ids < num_known
            ids, p = ids.where(is_known, 0), p * is_known
        weights = batch.weights[is_token]
        return HeadLoss.apply(hidden.float(), head, ids, p, weights / weights.sum(), num_known)


def hidden_states(student: PreTrainedModel, vocabulary: DraftVocabulary | None, token_ids: Tensor) -> Tensor:
    """What the student's head reads, (documents, tokens, hidden size), of documents padded at their end."""
    rows = token_ids if vocabulary is None else vocabulary.rows[token_ids]
    with torch.autocast(student.device.type, torch.bfloat16):
        return student.base_model(input_ids=rows, use_cache=False).last_hidden_state
