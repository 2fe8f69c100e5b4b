"""What the coordinator needs to turn text into tokens and back, read from a model's own files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

from sequoia.engine.sources import ModelFiles
from sequoia.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class TokenizerDescription:
    """A model's tokenizer without the model library."""

    tokenizer_json: bytes  # the `tokenizers` library's form, UTF-8
    chat_template: str  # Jinja; empty when the model has none
    eos_token_ids: tuple[int, ...]  # ascending
    special_tokens: dict[str, str]  # by the names chat templates use, such as bos_token
    vocab_size: int  # its largest id + 1, added tokens included
    tokenizer_hash: str  # SHA-256 over (id, token) by id, lower-case hex


def describe_tokenizer(
    files: ModelFiles,
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None,
    *,
    trust_remote_code: bool = False,
) -> TokenizerDescription:
    """Read the tokenizer of a folder of files (not of a GGUF file; see dense.py).

    The tokens that end a sequence are those of the generation config; where it names none, the model config's; where
    that names none, the tokenizer's. Raises InvalidArgument naming `model` when there is no fast tokenizer.
    """
    # AutoTokenizer rebuilds the tokenizer of some model types from its vocabulary, with another normaliser and tokens
    # of its own; what the model was trained with is tokenizer.json.
    kind = PreTrainedTokenizerFast if (files.directory / "tokenizer.json").exists() else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(files.directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise InvalidArgument(f"the tokenizer of {files.reference} cannot be loaded: {error}", "model") from error
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        raise InvalidArgument(f"{files.reference} has only a Python tokenizer ({name}); a fast one is needed", "model")
    # A copy: lengths from training, saved with the tokenizer, would cut or pad prompts in silence.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    template = tokenizer.chat_template
    return TokenizerDescription(
        tokenizer_json=backend.to_str().encode(),
        chat_template=(template.get("default", "") if isinstance(template, dict) else template) or "",
        eos_token_ids=_eos_token_ids(generation_config, config.get_text_config(), tokenizer),
        special_tokens={name: str(token) for name, token in tokenizer.special_tokens_map.items() if _is_token(token)},
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        tokenizer_hash=_tokenizer_hash(backend),
    )


def _is_token(value: object) -> bool:
    """The map holds lists of further tokens as well; templates name none of those."""
    return not isinstance(value, list | tuple | dict)


def _eos_token_ids(*sources: object) -> tuple[int, ...]:
    """From the first source that names any."""
    named = (getattr(source, "eos_token_id", None) for source in sources)
    found = next((ids for ids in named if ids is not None), ())
    return (found,) if isinstance(found, int) else tuple(sorted(set(found)))


def _tokenizer_hash(tokenizer: Tokenizer) -> str:
    pairs = sorted((token_id, token) for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
