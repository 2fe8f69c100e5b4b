"""The making of drafts: text, student, training, what it is worth; each part goes on where an earlier run ended."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sequoia.cli.steps import Steps
from sequoia.cli.training.card import Made
from sequoia.cli.training.recipe import CorpusRecipe, Size
from sequoia.cli.training.text import Author, corpus, documents_of, expected, known_tokens
from sequoia.cli.training.worth import Worth, measured_curve, worth_of
from sequoia.config import num_cores
from sequoia.engine import packed
from sequoia.engine.dense import dense_files
from sequoia.engine.distillation.corpus import Document, Shard
from sequoia.engine.distillation.ranking import acceptance_of, greedy_documents, ranks_of
from sequoia.engine.distillation.schedule import Schedule
from sequoia.engine.distillation.student import further_student, make_student, widen_head
from sequoia.engine.distillation.training import Training
from sequoia.engine.draft_vocabulary import DraftVocabulary
from sequoia.engine.model import LoadedModel, load_model
from sequoia.engine.sources import ModelFiles, is_packaged, resolve
from sequoia.errors import FailedPrecondition, InvalidArgument
from sequoia.hardware import LatencyCurve

CARD, FIGURES = "README.md", "training.json"
_OURS = frozenset((".safetensors", ".json", ".jinja", ".md"))  # what a draft consists of
_USUAL = Size(2, 12288)
# How often a training tells how far it is, and how often it is saved, in seconds.
_TELL_SECONDS, _SAVE_SECONDS = 60.0, 300.0
# Documents that acceptance is told of meanwhile.
_NUM_GLANCED = 64


@dataclass(frozen=True)
class Workshop:
    """Where drafts of one target are made of one text, by one kind of training."""

    corpus: CorpusRecipe
    training: Schedule
    out: Path
    corpus_dir: Path
    dtype: str
    device: str
    train_from: str | None  # a draft that is trained further; None: the target's layers
    is_packed: bool  # what is written, see packed.py
    step_seconds: float
    command: str
    steps: Steps

    def make(self, sizes: Sequence[Size]) -> list[Made]:
        """A draft of each size; the best, first in the list, is in `out`, the others are gone but for their figures.

        Without sizes: that of the draft which is trained further; or two layers, or all where nothing is trained, over
        the 12,288 most used tokens, or all. Raises InvalidArgument naming `size`, `packed` or `train-from`.
        """
        made = sorted(map(self._make, self._checked(sizes)), key=lambda each: -each.worth.tokens_per_second)
        self._keep(made[0])
        return made

    def _checked(self, sizes: Sequence[Size]) -> Sequence[Size]:
        """Before hours of work."""
        target = load_model(self._target_files, dtype=self.dtype, device=self.device)
        num_layers, vocab_size = target.module.config.get_text_config().num_hidden_layers, known_tokens(target)
        for size in sizes:
            if size.num_layers > num_layers or not 2 <= (size.num_tokens or vocab_size) <= vocab_size:
                raise InvalidArgument(f"{size} is not within the target's {num_layers} x {vocab_size}", "size")
        if self.is_packed and not packed.can_refer_to(self._dense_target):
            reason = f"cannot refer to the weights of {self.corpus.target}: they are in several files"
            raise InvalidArgument(reason, "packed")
        if self.train_from:
            if sizes:
                raise InvalidArgument(f"is that of {self.train_from}; leave it out", "size")
            return [self._begun_size(target)]
        usual_layers = min(_USUAL.num_layers, num_layers) if self.training.num_steps else num_layers
        usual = Size(usual_layers, _USUAL.num_tokens if _USUAL.num_tokens < vocab_size else 0)
        return sizes or [usual]

    @cached_property
    def _shards(self) -> list[Path]:
        with self.steps.step(f"text of {self.corpus.num_documents} documents, written by the target") as on_progress:
            author = partial(Author, self.corpus, self.dtype, self.device)
            return corpus(self.corpus, self.corpus_dir, author, on_progress)

    @cached_property
    def _target_files(self) -> ModelFiles:
        return resolve(self.corpus.target)

    @property
    def _dense_target(self) -> Path:
        return dense_files(self._target_files, torch.bfloat16).directory

    @cached_property
    def _target_curve(self) -> LatencyCurve:
        with self.steps.step("timing the target's forwards"):
            return measured_curve(self.corpus.target, device=self.device, is_draft=False)

    def _make(self, size: Size) -> Made:
        held_out, *shards = self._shards
        documents = greedy_documents(documents_of(held_out))
        if not documents:
            raise FailedPrecondition("no answer to measure with was greedy; ask for more documents", "documents")
        torch.set_num_threads(num_cores())
        target = load_model(self._target_files, dtype="float32", device=self.device)
        student, vocabulary, began_as = self._student(target, size, shards)
        training = Training(student, vocabulary, shards, self.training, began_as)
        checkpoint = self.out / "unfinished" / f"{size}.safetensors"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if checkpoint.exists():
            training.resume(checkpoint)
        self._train(size, training, checkpoint, documents[:_NUM_GLANCED])
        folder = checkpoint.with_suffix("")
        _write(student, vocabulary, target, folder)
        if self.is_packed:
            packed.pack(folder, _from_anywhere(self.corpus.target), self._dense_target)
        return Made(
            size=size,
            corpus=self.corpus,
            training=self.training,
            command=self.command,
            target_revision=target.revision,
            tokenizer_hash=target.tokenizer.tokenizer_hash,
            num_parameters=sum(each.numel() for each in student.parameters()),
            num_tokens_known=vocabulary.num_known if vocabulary else target.padded_vocab_size,
            coverage=self._coverage(vocabulary, known_tokens(target), shards),
            began_as=began_as,
            num_text_tokens=sum(Shard.load(path).num_tokens for path in shards),
            num_steps_done=training.num_steps_done,
            loss=None if math.isnan(training.loss) else training.loss,
            worth=self._worth(student, vocabulary, documents, folder),
        )

    def _student(
        self, target: LoadedModel, size: Size, shards: Sequence[Path]
    ) -> tuple[PreTrainedModel, DraftVocabulary | None, str]:
        """With its vocabulary, and what it began as if not as the target's layers."""
        if self.train_from:
            begun = self._begun
            return further_student(begun.module), begun.vocabulary, f"{self.train_from}, revision {begun.revision}"
        vocab_size = known_tokens(target)
        layers = range(size.num_layers)
        if size.num_tokens in (0, vocab_size):
            return make_student(target.module, layers, None), None, ""
        token_ids = expected(shards, vocab_size).topk(size.num_tokens).indices.sort().values.to(target.device)
        return make_student(target.module, layers, token_ids), DraftVocabulary(token_ids, vocab_size), ""

    @cached_property
    def _begun(self) -> LoadedModel:
        """The draft that is trained further."""
        assert self.train_from
        return load_model(resolve(self.train_from), dtype="float32", device=self.device)

    def _begun_size(self, target: LoadedModel) -> Size:
        """Raises InvalidArgument naming `train-from` for what is no draft of the target."""
        begun = self._begun
        if begun.tokenizer.tokenizer_hash != target.tokenizer.tokenizer_hash:
            raise InvalidArgument(f"{self.train_from} has another vocabulary than {self.corpus.target}", "train-from")
        ours, theirs = (each.module.config.get_text_config() for each in (begun, target))
        if begun.vocabulary and ours.hidden_size != theirs.hidden_size:
            problem = f"{self.train_from} has a hidden size of {ours.hidden_size}, not {theirs.hidden_size}"
            raise InvalidArgument(f"{problem} as the target, whose head it is to be written into", "train-from")
        return Size(ours.num_hidden_layers, begun.vocabulary.num_known if begun.vocabulary else 0)

    @staticmethod
    def _coverage(vocabulary: DraftVocabulary | None, vocab_size: int, shards: Sequence[Path]) -> float:
        """Share of what the target expects that the draft can propose."""
        if vocabulary is None:
            return 1.0
        mass = expected(shards, vocab_size)
        return float(mass[vocabulary.token_ids.cpu()].sum() / mass.sum())

    def _train(self, size: Size, training: Training, checkpoint: Path, glanced: Sequence[Document]) -> None:
        """To the end of the schedule."""
        told = saved = time.monotonic()
        done_before = training.num_steps_done
        with self.steps.step(f"training {size}") as on_progress:
            for _ in training.steps():
                on_progress(training.num_steps_done, self.training.num_steps)
                now = time.monotonic()
                if now - told > _TELL_SECONDS:
                    self._tell(size, training, glanced, (training.num_steps_done - done_before) / (now - told))
                    told, done_before = time.monotonic(), training.num_steps_done
                if now - saved > _SAVE_SECONDS:
                    training.save(checkpoint)
                    saved = time.monotonic()
        training.save(checkpoint)

    def _tell(self, size: Size, training: Training, documents: Sequence[Document], steps_per_second: float) -> None:
        acceptance = acceptance_of(ranks_of(training.student, training.vocabulary, documents))
        ranks = " ".join(f"{each:.3f}" for each in acceptance[:4])
        num_left = self.training.num_steps - training.num_steps_done
        self.steps.say(
            f"{size}, step {training.num_steps_done} of {self.training.num_steps}: loss {training.loss:.3f}, "
            f"acceptance by rank {ranks}, {num_left / steps_per_second / 60:.0f} min left"
        )

    def _worth(
        self, student: PreTrainedModel, vocabulary: DraftVocabulary | None, documents: Sequence[Document], folder: Path
    ) -> Worth:
        ranks = ranks_of(student, vocabulary, documents)
        with self.steps.step("timing the draft's forwards"):
            curve = measured_curve(str(folder), device=self.device, is_draft=True)
        return worth_of(ranks, curve, self._target_curve, self.step_seconds)

    def _keep(self, made: Made) -> None:
        """Move the draft to where it was asked for, and remove other ones; checkpoints stay, to train on."""
        unfinished = self.out / "unfinished"
        for file in list(self.out.iterdir()):
            if file.suffix in _OURS:
                file.unlink()
        for file in (unfinished / str(made.size)).iterdir():
            os.replace(file, self.out / file.name)
        for folder in filter(Path.is_dir, list(unfinished.iterdir())):
            shutil.rmtree(folder)
        (self.out / CARD).write_text(made.to_markdown())
        (self.out / FIGURES).write_text(json.dumps(made.to_dict(), indent=1))


def _from_anywhere(reference: str) -> str:
    """A model's reference that does not depend on the working folder."""
    path = Path(reference).expanduser()
    return str(path.resolve()) if path.exists() and not is_packaged(reference) else reference


def _write(student: PreTrainedModel, vocabulary: DraftVocabulary | None, target: LoadedModel, folder: Path) -> None:
    """A folder as any model's: configuration, weights in bfloat16, the target's tokenizer; and the vocabulary."""
    whole = copy.deepcopy(student)
    if vocabulary is not None:
        widen_head(whole, target.module, vocabulary.token_ids)
    whole.bfloat16().save_pretrained(folder)
    described = target.tokenizer
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_buffer(described.tokenizer_json),
        chat_template=described.chat_template or None,
        **described.special_tokens,
    ).save_pretrained(folder)
    if vocabulary is not None:
        vocabulary.save(folder)
