"""What a student is worth before it serves: the ranks of its target's tokens among those that it would propose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from sequoia.engine.distillation.batches import collate
from sequoia.engine.distillation.corpus import Document
from sequoia.engine.distillation.training import hidden_states
from sequoia.engine.draft_vocabulary import DraftVocabulary

# Ranks that are told apart.
NUM_RANKS = 16
_DOCUMENTS_AT_ONCE = 16

Ranks = list[int | None]


@torch.no_grad()
def ranks_of(
    student: PreTrainedModel, vocabulary: DraftVocabulary | None, documents: Sequence[Document]
) -> list[Ranks]:
    """By document: where the target's likeliest token stands among the student's, behind every token from the answer's
    first on; None where it is not among the `NUM_RANKS` first.
    """
    student.eval()
    found: list[Ranks] = []
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        some = documents[start : start + _DOCUMENTS_AT_ONCE]
        batch = collate(some).to(student.device)
        hidden = hidden_states(student, batch.token_ids)
        for row, document in enumerate(some):
            tokens = slice(document.answer_start, len(document.token_ids) - 1)
            found.append(_ranks(student, vocabulary, hidden[row, tokens], document.teacher_ids[tokens, 0]))
    student.train()
    return found


def acceptance_of(ranks: Sequence[Ranks]) -> tuple[float, ...]:
    """By rank, over all positions alike: what a step meets is some per cent less."""
    every = [rank for each in ranks for rank in each]
    return tuple(every.count(rank) / max(1, len(every)) for rank in range(NUM_RANKS))


def greedy_documents(documents: Sequence[Document]) -> list[Document]:
    """Those whose answers are the target's likeliest tokens throughout."""
    return [each for each in documents if _is_greedy(each)]


def _is_greedy(document: Document) -> bool:
    first = document.answer_start
    return bool((document.token_ids[first:] == document.teacher_ids[first - 1 :, 0]).all())


def _ranks(
    student: PreTrainedModel, vocabulary: DraftVocabulary | None, hidden: torch.Tensor, wanted: torch.Tensor
) -> Ranks:
    logits = (hidden.bfloat16() @ student.get_output_embeddings().weight.bfloat16().T).float()
    proposed = logits.topk(NUM_RANKS).indices.cpu()
    if vocabulary is not None:
        proposed = vocabulary.token_ids.cpu()[proposed]
    hits = (proposed == wanted[:, None]).int()
    return [int(row.argmax()) if row.any() else None for row in hits]
