"""A model ready to run: weights in one dtype on one device, its tokenizer, and what the handshake tells of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from sequoia.config import cpu_flags
from sequoia.engine.architecture import check_attention, check_config
from sequoia.engine.dense import dense_files
from sequoia.engine.draft_vocabulary import DraftVocabulary, narrow_head, read_vocabulary
from sequoia.engine.native.decoder import can_run_config
from sequoia.engine.native.library import why_unavailable
from sequoia.engine.offload.checkpoint import Checkpoint
from sequoia.engine.offload.hollow import hollow_module, weight_names
from sequoia.engine.sources import ModelFiles
from sequoia.engine.tensor_parallel.plan import check_plan, placement
from sequoia.engine.tensor_parallel.ranks import Ranks
from sequoia.engine.tokenizer import TokenizerDescription, describe_tokenizer
from sequoia.errors import InvalidArgument
from sequoia.process_memory import available_bytes

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode, without gradients."""

    module: PreTrainedModel
    tokenizer: TokenizerDescription
    dtype: torch.dtype  # of the weights
    dtype_name: str
    device: torch.device
    padded_vocab_size: int  # width of the logits, in tokens
    context_length: int  # longest sequence the model was made for, in tokens
    revision: str
    reference: str
    quantization: str = "none"  # of the module, by quantization.py
    vocabulary: DraftVocabulary | None = None  # of a draft whose head has its tokens only
    checkpoint: Checkpoint | None = None  # where the weights are when the module has none


def load_model(
    files: ModelFiles,
    *,
    dtype: str,
    device: str,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    offload: str = "none",
    engine: str = "auto",
    ranks: Ranks | None = None,
) -> LoadedModel:
    """Load a causal LM with its tokenizer.

    offload: `none`; `disk` for the CPU and `host` for a GPU, without its weights, for a decoder that reads them later;
    `auto`, the same where they do not fit. ranks: those that have parts of it, each its own, all of which load it now.
    dtype: auto (by what `engine` makes of it), float32, bfloat16 or float16; device: auto, cpu or cuda. Raises
    InvalidArgument naming `model` for one that cannot be loaded or served, and naming `device` for what this machine
    lacks.
    """
    if not sys.stderr.isatty():
        # Bars would break up the JSON lines of the log.
        transformers_logging.disable_progress_bar()
    place = _device(device)
    element = _auto_dtype(place, engine) if dtype == "auto" else _DTYPES[dtype]
    given, files = files, dense_files(files, element)
    config = _load_config(files, trust_remote_code)
    check_config(config, files.reference)
    num_ranks = ranks.count if ranks else 1
    if num_ranks > 1:
        check_plan(config, num_ranks, files.reference)
    if dtype == "auto" and element == torch.bfloat16 and not (_multiplies_bfloat16(place) or can_run_config(config)):
        element = torch.float32
        files = dense_files(given, element)
    is_hollow = _is_hollow(files, offload, place, num_ranks)
    if is_hollow:
        module = hollow_module(config, files.directory, element)
    else:
        module = _load_module(files, config, element, place, attn_implementation, trust_remote_code, num_ranks)
    if ranks:
        ranks.wait_for_all()
    check_attention(module, files.reference)
    num_rows = module.get_output_embeddings().out_features
    tokenizer = describe_tokenizer(files, module.config, module.generation_config, trust_remote_code=trust_remote_code)
    vocabulary = read_vocabulary(files.directory, tokenizer.vocab_size, num_rows, place)
    if vocabulary is not None:
        narrow_head(module, vocabulary.token_ids)
    return LoadedModel(
        module=module,
        tokenizer=tokenizer,
        dtype=element,
        dtype_name=str(element).removeprefix("torch."),
        device=place,
        padded_vocab_size=vocabulary.size if vocabulary else num_rows,
        context_length=config.get_text_config().max_position_embeddings,
        revision=files.revision,
        reference=files.reference,
        vocabulary=vocabulary,
        checkpoint=Checkpoint(files.directory, element, weight_names(module)) if is_hollow else None,
    )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("torch finds no CUDA device; use cpu or auto", "device")
    return torch.device(device)


def _auto_dtype(place: torch.device, engine: str) -> torch.dtype:
    """bfloat16 where it is multiplied natively, or by the C engine: as torch emulates it, it is slower than float32."""
    takes_it = engine in ("auto", "native") and not why_unavailable()
    return torch.bfloat16 if takes_it or _multiplies_bfloat16(place) else torch.float32


def _multiplies_bfloat16(place: torch.device) -> bool:
    return place.type == "cuda" or bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


def _load_config(files: ModelFiles, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(files.directory, trust_remote_code=trust_remote_code)
    except _LOAD_ERRORS as error:
        raise _unloadable(files, error) from error


def _is_hollow(files: ModelFiles, offload: str, place: torch.device, num_ranks: int) -> bool:
    """Raises InvalidArgument naming `offload` or `model` for what the memory or the device does not allow."""
    tier = "disk" if place.type == "cpu" else "host"
    if offload not in ("none", "auto", tier):
        raise InvalidArgument(f"{offload} is no tier of a model on {place.type}; use {tier}", "offload")
    size, free = sum(path.stat().st_size for path in files.directory.glob("*.safetensors")), free_bytes(place)
    if place.type != "cpu":
        size //= num_ranks
    if offload == tier or free is None or size < free:
        return offload == tier
    if offload == "none":
        problem = f"{files.reference} has {size / 1e9:.1f} GB of weights, and {free / 1e9:.1f} GB of memory are free"
        raise InvalidArgument(f"{problem}; free some, or serve it as a target with --offload {tier}", "model")
    return True


def free_bytes(place: torch.device) -> int | None:
    """Of the device's memory at this moment; None where it is not told."""
    return torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else available_bytes()


def _load_module(
    files: ModelFiles,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    place: torch.device,
    attn_implementation: str,
    trust_remote_code: bool,
    num_ranks: int,
) -> PreTrainedModel:
    where = placement(num_ranks) if num_ranks > 1 else {"device_map": place}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.directory,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **where,
        )
    except _LOAD_ERRORS as error:
        raise _unloadable(files, error) from error
    module, info = loaded
    if missing := sorted(info["missing_keys"]):
        # They would be random, and the text garbage.
        raise InvalidArgument(f"{files.reference} lacks {len(missing)} weights, the first is {missing[0]}", "model")
    return module.eval().requires_grad_(False)


def _unloadable(files: ModelFiles, error: Exception) -> InvalidArgument:
    return InvalidArgument(f"{files.reference} cannot be loaded: {error}", "model")
