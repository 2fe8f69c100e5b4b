"""A target writes: many documents at a time, each a question that it makes up and its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from sequoia.engine.attention import Segment, chunk_segment
from sequoia.engine.distillation.corpus import TEACHER_WIDTH, Document
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVSlot

# A question is drawn at this temperature.
_QUESTION_TEMPERATURE = 1.0
# Tokens of several sessions in a forward; all their logits are wanted.
_MOST_TOKENS = 512


class Assignment(NamedTuple):
    """What to write: a question that begins with `opening`, `turn`, which leads to the answer, and the answer."""

    opening: tuple[int, ...]
    turn: tuple[int, ...]  # its first token ends a question; empty: there is no question, the text goes on
    temperature: float  # of the answer


@dataclass(frozen=True, slots=True)
class Lengths:
    """Most tokens of either part."""

    question: int
    answer: int

    @property
    def most(self) -> int:
        """Of a document, beside its opening and the turn."""
        return self.question + self.answer


@dataclass(slots=True)
class _Session:
    slot: KVSlot
    assignment: Assignment
    pending: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)
    teacher: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    answer_start: int = 0  # 0: still asking

    def segment(self) -> Segment:
        """Its next tokens; what is expected behind each is wanted."""
        segment = chunk_segment(self.slot, self.pending, logits=True)
        return replace(segment, logit_tokens=tuple(range(len(self.pending))))

    def take(self, ids: np.ndarray, logs: np.ndarray) -> None:
        """What a forward of the pending tokens told: they are written now."""
        self.teacher.extend(zip(ids, logs, strict=True))
        self.token_ids.extend(self.pending)
        self.slot.keep(range(len(self.pending)))

    def document(self) -> Document:
        """What is written; behind its last token nothing is known."""
        ids, logs = (np.stack(part) for part in zip(*self.teacher[: len(self.token_ids) - 1], strict=True))
        return Document(
            torch.tensor(self.token_ids, dtype=torch.int32),
            self.answer_start,
            torch.from_numpy(ids.astype(np.int32)),
            torch.from_numpy(logs.astype(np.float16)),
        )


def write(
    engine: Engine,
    assignments: Sequence[Assignment],
    eos_token_ids: Sequence[int],
    lengths: Lengths,
    generator: np.random.Generator,
    vocab_size: int,
) -> Iterator[Document]:
    """The documents as they are finished. Tokens are drawn from the `TEACHER_WIDTH` likeliest below `vocab_size`.

    As many at a time as the engine's cache has slots, which must hold whole documents.
    """
    waiting, sessions = list(reversed(assignments)), list[_Session]()
    with ExitStack() as slots:
        free = [slots.enter_context(engine.cache.slot()) for _ in range(engine.cache.num_slots)]
        while waiting or sessions:
            while waiting and free:
                sessions.append(_begin(free.pop(), waiting.pop()))
            _take_forwards(engine, sessions, vocab_size)
            running = []
            for session, uniform in zip(sessions, generator.random(len(sessions)), strict=True):
                if _advance(session, uniform, eos_token_ids, lengths):
                    running.append(session)
                else:
                    session.slot.truncate(0)
                    free.append(session.slot)
                    yield session.document()
            sessions = running


def read(engine: Engine, texts: Sequence[tuple[int, ...]], vocab_size: int) -> Iterator[Document]:
    """Somebody else's texts, with what the target expected behind each of their tokens."""
    for token_ids in texts:
        with engine.cache.slot() as slot:
            session = _Session(slot, Assignment(token_ids, (), 0.0), token_ids)
            [logits] = engine.forward([session.segment()])
            session.take(*_likeliest(logits[:, :vocab_size]))
            yield session.document()


def _take_forwards(engine: Engine, sessions: Sequence[_Session], vocab_size: int) -> None:
    """Give every session what its pending tokens' forward tells."""
    for some in _sharing(sessions):
        logits = torch.cat(engine.forward([session.segment() for session in some]))
        ids, logs = _likeliest(logits[:, :vocab_size])
        start = 0
        for session in some:
            end = start + len(session.pending)
            session.take(ids[start:end], logs[start:end])
            start = end


def _sharing(sessions: Sequence[_Session]) -> Iterator[list[_Session]]:
    """Those that share a forward: one after another, as far as their logits' memory goes."""
    some: list[_Session] = []
    num_tokens = 0
    for session in sessions:
        num_tokens += len(session.pending)
        if some and num_tokens > _MOST_TOKENS:
            yield some
            some, num_tokens = [], len(session.pending)
        some.append(session)
    yield some


def _begin(slot: KVSlot, assignment: Assignment) -> _Session:
    answer_start = 0 if assignment.turn else len(assignment.opening)
    return _Session(slot, assignment, assignment.opening, answer_start=answer_start)


def _advance(session: _Session, uniform: float, eos_token_ids: Sequence[int], lengths: Lengths) -> bool:
    """Choose what comes next. False when the document is finished."""
    ids, logs = session.teacher[-1]
    num_tokens, turn = len(session.token_ids), session.assignment.turn
    if session.answer_start:
        session.pending = (int(ids[_draw(logs, session.assignment.temperature, uniform)]),)
        is_ended = num_tokens > session.answer_start and session.token_ids[-1] in eos_token_ids
        return not is_ended and num_tokens < session.answer_start + lengths.answer
    token = int(ids[_draw(logs, _QUESTION_TEMPERATURE, uniform)])
    is_asked = num_tokens >= len(session.assignment.opening) + lengths.question
    if is_asked or token in (turn[0], *eos_token_ids):
        session.pending, session.answer_start = turn, num_tokens + len(turn)
    else:
        session.pending = (token,)
    return True


def _draw(logs: np.ndarray, temperature: float, uniform: float) -> int:
    if temperature == 0.0:
        return 0
    weights = np.exp((logs - logs[0]) / temperature).cumsum()
    return min(int(np.searchsorted(weights, uniform * weights[-1])), len(logs) - 1)


def _likeliest(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(rows, TEACHER_WIDTH) ids and log p of the likeliest tokens, likeliest first."""
    values = logits.float()
    found = values.topk(TEACHER_WIDTH)
    logs = found.values - values.logsumexp(-1, keepdim=True)
    return found.indices.cpu().numpy(), logs.cpu().numpy()
