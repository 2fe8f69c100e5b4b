"""The text that a draft learns from: written by its target into a folder of shards, as far as it is not there yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from coordinator.chat_template import ChatTemplate
from coordinator.conversation import question
from sequoia.cli.training.recipe import CorpusRecipe
from sequoia.config import num_cores
from sequoia.engine.decoders import Arithmetic, build_decoder
from sequoia.engine.distillation.corpus import Document, Shard
from sequoia.engine.distillation.writing import Assignment, Lengths, read, write
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.model import LoadedModel, load_model
from sequoia.engine.sources import resolve
from sequoia.engine.tokenizer import TokenizerDescription
from sequoia.errors import FailedPrecondition, InvalidArgument

# Documents written at the same time: beyond that a forward on a CPU takes as much longer as it has more tokens.
_AT_ONCE = 128
# Of the answers: what requests ask for most.
_TEMPERATURES = (0.0, 0.6, 1.0)
_FINGERPRINT = "corpus.json"
_SPLIT = "\u241e"  # a sign that no opening has


class Author:
    """A target, ready to write. Raises InvalidArgument naming `answer-tokens` when its context is too short."""

    def __init__(self, recipe: CorpusRecipe, dtype: str, device: str) -> None:
        torch.set_num_threads(num_cores())
        files = resolve(recipe.target)
        model = load_model(files, dtype=dtype, device=device)
        self._recipe, self._lengths = recipe, Lengths(recipe.question_tokens, recipe.answer_tokens)
        self._tokenizer = Tokenizer.from_buffer(model.tokenizer.tokenizer_json)
        self._eos_token_ids, self._vocab_size = model.tokenizer.eos_token_ids, known_tokens(model)
        before, self._after = _turns(model.tokenizer)
        self._turn = self._ids(self._after)
        self._openings = [[self._ids(before + each) for each in kind] for kind in recipe.openings.values()]
        longest = max(len(each) for kind in self._openings for each in kind) + len(self._turn) + self._lengths.most
        if longest > model.context_length:
            problem = f"documents of up to {longest} tokens do not fit the target's context of {model.context_length}"
            raise InvalidArgument(f"{problem}; ask for shorter ones", "answer-tokens")
        num_layers = model.module.config.get_text_config().num_hidden_layers
        decoder = build_decoder(model, Arithmetic(num_threads=num_cores()), longest, files.cache_dir)
        self._engine = Engine(decoder, KVCache(num_layers, _AT_ONCE, longest), model.device, model.dtype)

    def shard(self, index: int) -> Shard:
        """One of the recipe's shards; the same whichever were written before."""
        generator = np.random.default_rng([self._recipe.seed, index])
        assignments = [self._assignment(number, generator) for number in range(self._recipe.documents_in_shard)]
        written = write(self._engine, assignments, self._eos_token_ids, self._lengths, generator, self._vocab_size)
        return Shard.of(list(written))

    def reading(self) -> Shard:
        """The recipe's texts, in pieces of the length of a document."""
        longest = self._lengths.most
        ids = (tuple(self._tokenizer.encode(text).ids) for text in self._recipe.texts)
        pieces = [each[start : start + longest] for each in ids for start in range(0, len(each) - 1, longest)]
        if not pieces:
            raise InvalidArgument("holds no text of two tokens or more", "text")
        return Shard.of(list(read(self._engine, pieces, self._vocab_size)))

    def _assignment(self, number: int, generator: np.random.Generator) -> Assignment:
        openings = self._openings[number % len(self._openings)]
        opening = openings[generator.integers(len(openings))]
        return Assignment(opening, self._turn, _TEMPERATURES[generator.integers(len(_TEMPERATURES))])

    def _ids(self, text: str) -> tuple[int, ...]:
        # A template writes its special tokens itself; without one there is no turn either, and the tokenizer adds them.
        return tuple(self._tokenizer.encode(text, add_special_tokens=not self._after).ids) if text else ()


def _turns(tokenizer: TokenizerDescription) -> tuple[str, str]:
    """What stands before a question and behind it; nothing where the model has no chat template."""
    if not tokenizer.chat_template:
        return "", ""
    rendered = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens).render(question(_SPLIT).messages)
    if rendered.count(_SPLIT) != 1:
        raise InvalidArgument("its chat template does not write a question as it is, once; use another model", "target")
    before, _, after = rendered.partition(_SPLIT)
    return before, after


def known_tokens(model: LoadedModel) -> int:
    """Of its tokenizer: the rest of the logits is padding."""
    return min(model.tokenizer.vocab_size, model.padded_vocab_size)


def corpus(
    recipe: CorpusRecipe, folder: Path, author: Callable[[], Author], on_progress: Callable[[int, int], None]
) -> list[Path]:
    """The recipe's shards, the first one to measure with, those of the user's texts last.

    What is missing in `folder` is written by `author`, which is called then only. Raises FailedPrecondition naming
    `corpus` for a folder of another recipe.
    """
    _claim(folder, recipe)
    count = 1 + -(-recipe.num_documents // recipe.documents_in_shard)
    paths = [folder / f"{index:04d}.safetensors" for index in range(count)]
    missing = [(index, path) for index, path in enumerate(paths) if not path.exists()]
    read_path = folder / "read.safetensors"
    if missing or (recipe.texts and not read_path.exists()):
        writer = author()
        if recipe.texts and not read_path.exists():
            writer.reading().save(read_path)
        for index, path in missing:
            on_progress(index, count)
            writer.shard(index).save(path)
    return [*paths, *([read_path] if recipe.texts else [])]


def documents_of(path: Path) -> list[Document]:
    """Of one shard."""
    return list(Shard.load(path).documents())


def expected(paths: Sequence[Path], vocab_size: int) -> torch.Tensor:
    """(vocab_size,) float32: how often the target expected each token in these shards, in tokens."""
    return sum((Shard.load(path).expected(vocab_size) for path in paths), torch.zeros(vocab_size))


def _claim(folder: Path, recipe: CorpusRecipe) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _FINGERPRINT
    if not file.exists():
        file.write_text(recipe.fingerprint)
    elif file.read_text() != recipe.fingerprint:
        raise FailedPrecondition(f"{folder} holds the text of another target, seed or openings; name another", "corpus")
