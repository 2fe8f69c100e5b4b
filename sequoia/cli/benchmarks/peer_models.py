"""The served models as files on this machine, for peers that load them by themselves; and the target's tokenizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coordinator.conversation import question
from coordinator.text import TextCodec
from sequoia.cli.benchmarks.peer_process import PeerFailed
from sequoia.cli.benchmarks.prompt_set import BenchPrompt
from sequoia.errors import SequoiaError
from sequoia.v1.coordinator_pb2 import DescribePairResponse
from sequoia.v1.worker_pb2 import WorkerDescription

# A context is as long as the longest prompt and its answer, and a multiple of this: engines round.
_CONTEXT_STEP = 256


@dataclass(frozen=True, slots=True)
class PeerModel:
    """One model: dense safetensors in `folder`, the GGUF file that they came from, if any, and a folder for more."""

    folder: str
    gguf: str | None
    cache: str


@dataclass(frozen=True, slots=True)
class PeerModels:
    """What all peers work on."""

    target: PeerModel
    draft: PeerModel | None
    dtype: str
    codec: TextCodec
    gguf_type: str  # of the target's GGUF file, such as Q4_K_M; "" without one


@dataclass(frozen=True, slots=True)
class PeerWork:
    """What a benchmark asks of every peer: all prompts as token ids, and the most tokens of an answer."""

    models: PeerModels
    prompts: dict[BenchPrompt, tuple[int, ...]]
    max_tokens: int

    def load_request(self, variant: str, num_threads: int) -> dict[str, Any]:
        """The first line to a peer."""
        longest = max(map(len, self.prompts.values())) + self.max_tokens + 1
        return {
            "target": asdict(self.models.target),
            "draft": asdict(self.models.draft) if self.models.draft else None,
            "variant": variant,
            "dtype": self.models.dtype,
            "num_threads": num_threads,
            "context_length": -(-longest // _CONTEXT_STEP) * _CONTEXT_STEP,
            "eos_token_ids": sorted(self.models.codec.eos_token_ids),
        }


def find_models(pair: DescribePairResponse) -> PeerModels:
    """The pair's own models. Raises PeerFailed unless this machine has the very same."""
    try:
        return _find(pair)
    except SequoiaError as error:
        raise PeerFailed(f"the models that are served are not to be had here: {error}") from error


def encode(models: PeerModels, prompts: Sequence[BenchPrompt], is_raw: bool) -> dict[BenchPrompt, tuple[int, ...]]:
    """Token ids: of text to continue, or of a user's message. Raises InvalidArgument naming `chat`."""
    if is_raw:
        return {prompt: models.codec.encode(prompt.text) for prompt in prompts}
    return {prompt: models.codec.encode_chat(question(prompt.text)) for prompt in prompts}


def _find(pair: DescribePairResponse) -> PeerModels:
    target = _model(pair.verify)
    return PeerModels(
        target,
        _model(pair.draft) if pair.HasField("draft") else None,
        pair.verify.dtype,
        _codec(Path(target.folder), pair.verify.model),
        _gguf_type(target.gguf),
    )


def _model(worker: WorkerDescription) -> PeerModel:
    import torch

    from sequoia.engine.dense import dense_files
    from sequoia.engine.sources import resolve

    revision, cache_dir = (os.environ.get(name) or None for name in ("SEQUOIA_REVISION", "SEQUOIA_CACHE_DIR"))
    files = resolve(worker.model, revision=revision, cache_dir=cache_dir)
    if files.revision != worker.model_revision:
        raise PeerFailed(f"{worker.model} is revision {files.revision} here, {worker.model_revision} is served")
    gguf = str(files.directory / files.gguf_file) if files.gguf_file else None
    dense = dense_files(files, getattr(torch, worker.dtype))
    return PeerModel(str(dense.directory), gguf, str(files.cache_dir / "peers" / "models" / files.revision))


def _codec(folder: Path, reference: str) -> TextCodec:
    """The tokenizer as the verify worker describes it."""
    from transformers import AutoConfig, GenerationConfig

    from sequoia.cli.subject import codec_of
    from sequoia.engine.sources import ModelFiles
    from sequoia.engine.tokenizer import describe_tokenizer

    config = AutoConfig.from_pretrained(folder)
    has_generation = (folder / "generation_config.json").exists()
    generation = GenerationConfig.from_pretrained(folder) if has_generation else None
    return codec_of(describe_tokenizer(ModelFiles(reference, folder, None, "", folder), config, generation))


def _gguf_type(file: str | None) -> str:
    if file is None:
        return ""
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(file).get_field("general.file_type")
    return LlamaFileType(int(field.contents())).name.removeprefix("MOSTLY_") if field else ""
