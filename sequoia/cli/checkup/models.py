"""Whether two models fit each other and the machine, before either is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sequoia.cli.checkup.finding import Finding
from sequoia.errors import InvalidArgument, SequoiaError
from sequoia.process_memory import available_bytes

if TYPE_CHECKING:
    from sequoia.engine.sources import ModelFiles
    from sequoia.engine.tokenizer import TokenizerDescription

_GB = 1e9
_BYTES_OF_16_BITS = 2


def check_models(target: str, draft: str | None) -> Iterator[Finding]:
    """Their files, their size against what is free, and their tokenizers."""
    found = {}
    for name, reference in (("target", target), ("draft", draft)):
        if reference is None:
            continue
        try:
            files = _files(reference)
            found[name] = _tokenizer(files)
        except SequoiaError as error:
            remedy = "give a packaged name, a hub id, a folder of safetensors, or a GGUF file"
            yield Finding(name, "bad", f"{reference}: {error}", remedy)
            continue
        yield _check_size(name, files)
    if len(found) == 2:
        yield _check_tokenizers(target, found["target"], str(draft), found["draft"])


def _files(reference: str) -> ModelFiles:
    from sequoia.engine.sources import resolve

    return resolve(reference)


def _tokenizer(files: ModelFiles) -> TokenizerDescription | None:
    """None for a GGUF file, whose tokenizer is not read before the model is."""
    from transformers import AutoConfig

    from sequoia.engine.tokenizer import describe_tokenizer

    if files.gguf_file is not None:
        return None
    try:
        config = AutoConfig.from_pretrained(files.directory)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidArgument(f"its config.json cannot be read: {error}", "model") from error
    return describe_tokenizer(files, config, None)


def _check_size(name: str, files: ModelFiles) -> Finding:
    size, free = _num_bytes(files), available_bytes()
    told = f"{files.reference}: {size / _GB:.2f} GB of weights"
    if free is not None and size > free:
        remedy = "free some, use a smaller one, or stream it: `sequoia up --offload disk` (a GPU's target: host)"
        return Finding(name, "bad", f"{told}, and {free / _GB:.2f} GB of memory are free", remedy)
    return Finding(name, "good", told)


def _num_bytes(files: ModelFiles) -> int:
    """In memory, of a GGUF file's in 16 bits, as which they are read at least."""
    if files.gguf_file is None:
        return sum(each.stat().st_size for each in files.directory.glob("*.safetensors"))
    from gguf import GGUFReader

    reader = GGUFReader(files.directory / files.gguf_file)
    return _BYTES_OF_16_BITS * sum(int(each.n_elements) for each in reader.tensors)


def _check_tokenizers(
    target: str, ours: TokenizerDescription | None, draft: str, theirs: TokenizerDescription | None
) -> Finding:
    if ours is None or theirs is None:
        return Finding("pair", "note", "a GGUF file's tokenizer is compared when the workers have started")
    if ours.tokenizer_hash == theirs.tokenizer_hash:
        return Finding("pair", "good", f"{draft} speaks {target}'s {ours.vocab_size} tokens")
    remedy = "choose a draft of the target's family, make one (`sequoia train-draft`), or leave --draft out"
    sizes = f"{ours.vocab_size} tokens and {theirs.vocab_size}"
    return Finding("pair", "bad", f"{target} and {draft} have different tokenizers ({sizes})", remedy)
