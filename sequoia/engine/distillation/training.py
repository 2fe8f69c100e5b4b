"""The training: a student learns its target's distribution behind every token, step by step, and can be resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sequoia.engine.distillation.batches import Batch, collate, grouped
from sequoia.engine.distillation.corpus import Document, Shard
from sequoia.engine.distillation.loss import HeadLoss
from sequoia.engine.distillation.optimizer import Optimizer
from sequoia.engine.distillation.schedule import Schedule
from sequoia.engine.draft_vocabulary import DraftVocabulary
from sequoia.errors import FailedPrecondition

# How much of the loss so far counts for the loss lately.
_MEMORY = 0.98
_STUDENT = "student."


class Training:
    """A student being trained on shards of text. The same arguments take the same steps, resumed or not."""

    def __init__(
        self,
        student: PreTrainedModel,
        vocabulary: DraftVocabulary | None,
        shards: Sequence[Path],
        schedule: Schedule,
        began_as: str = "",
    ) -> None:
        """`began_as` tells students apart that have the same shape."""
        self.student, self._vocabulary, self._shards, self.schedule = student, vocabulary, shards, schedule
        self._began_as = began_as
        student.train()
        self._parameters = {name: each for name, each in student.named_parameters() if each.requires_grad}
        self._optimizer = Optimizer(student)
        self.num_steps_done, self.loss = 0, math.nan  # the loss lately, in nats a token

    @property
    def vocabulary(self) -> DraftVocabulary | None:
        """What the student proposes; None: all tokens."""
        return self._vocabulary

    def steps(self) -> Iterator[float]:
        """What is left of the schedule; yields every step's own loss."""
        for number, documents in enumerate(self._groups()):
            if number == self.schedule.num_steps:
                return
            if number == self.num_steps_done:
                yield self._step(collate(documents).to(self.student.device))

    def save(self, path: Path) -> None:
        """A checkpoint, whole or not at all."""
        tensors = {f"{_STUDENT}{name}": each.detach() for name, each in self._parameters.items()}
        tensors |= self._optimizer.state()
        partial = path.with_suffix(".partial")
        state = {"step": self.num_steps_done, "loss": self.loss}
        save_file(tensors, partial, {"follows_from": self._follows_from, "state": json.dumps(state)})
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises FailedPrecondition for one that began, learns or proposes otherwise."""
        metadata, tensors = _read(path)
        if metadata.get("follows_from") != self._follows_from:
            raise FailedPrecondition(f"{path} is of another training; name another --out, or remove it", "out")
        state = json.loads(metadata["state"])
        self.num_steps_done, self.loss = state["step"], state["loss"]
        for name, value in tensors.items():
            if name.startswith(_STUDENT):
                self._parameters[name.removeprefix(_STUDENT)].data.copy_(value)
            else:
                self._optimizer.restore(name, value)

    @property
    def _follows_from(self) -> str:
        """What a checkpoint is good for. The vocabulary follows from all of the text: a row is another token else."""
        known = self._vocabulary.token_ids.tolist() if self._vocabulary else "all"
        shards = [path.name for path in self._shards]
        named = {"began_as": self._began_as, "schedule": asdict(self.schedule), "shards": shards, "token_ids": known}
        return json.dumps(named)

    def _groups(self) -> Iterator[list[Document]]:
        """Batches without end, every document once an epoch, in an order that follows from the seed."""
        for epoch in count():
            generator = torch.Generator().manual_seed((self.schedule.seed << 20) + epoch)
            for index in torch.randperm(len(self._shards), generator=generator):
                documents = list(Shard.load(self._shards[index]).documents())
                yield from grouped(documents, self.schedule.batch_tokens, generator)

    def _step(self, batch: Batch) -> float:
        loss = self._loss(batch)
        torch.autograd.backward(loss)
        self._optimizer.step(self.schedule.rate(self.num_steps_done))
        self.num_steps_done += 1
        found = loss.item()
        self.loss = found if math.isnan(self.loss) else _MEMORY * self.loss + (1.0 - _MEMORY) * found
        return found

    def _loss(self, batch: Batch) -> Tensor:
        """Cross entropy in nats a token; p of tokens that the student does not know is nobody's to learn."""
        vocabulary, head = self._vocabulary, self.student.get_output_embeddings().weight
        is_token = batch.weights > 0.0
        hidden = hidden_states(self.student, batch.token_ids)[is_token]
        ids, p = batch.teacher_ids[is_token], batch.teacher_p[is_token]
        if vocabulary is not None:
            ids = vocabulary.rows[ids]
            is_known = ids < vocabulary.num_known
            ids, p = ids.where(is_known, 0), p * is_known
        weights = batch.weights[is_token]
        return HeadLoss.apply(hidden.float(), head, ids, p, weights / weights.sum())


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a checkpoint. Raises FailedPrecondition naming `out` for a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, load_file(path)
    except (OSError, SafetensorError) as error:
        raise FailedPrecondition(f"{path} cannot be read: {error}; remove it to begin anew", "out") from error


def hidden_states(student: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """What the student's head reads, (documents, tokens, hidden size), of documents padded at their end."""
    with torch.autocast(student.device.type, torch.bfloat16):
        return student.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
