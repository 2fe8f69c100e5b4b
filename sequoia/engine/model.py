"""Loading: from files to a model in evaluation mode, with its tokenizer described."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from sequoia.engine.quantization import quantize_int8
from sequoia.engine.sources import ModelFiles, default_cache_dir, told
from sequoia.engine.tokenizer import TokenizerDescription, describe_tokenizer
from sequoia.errors import InvalidArgument

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Attention that is more than softmax(q k + mask) v, by the configuration's names for it.
_UNSERVED_ATTENTION = ("attn_logit_softcapping", "attention_sink", "linear_attn_config")
_SERVED_LAYERS = {"full_attention", "sliding_attention", "attention"}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to serve."""

    module: PreTrainedModel
    tokenizer: TokenizerDescription
    reference: str
    revision: str
    dtype: torch.dtype
    dtype_name: str
    quantization: str
    device: torch.device

    @property
    def padded_vocab_size(self) -> int:
        """Width of the logits."""
        return int(self.module.config.get_text_config().vocab_size)

    @property
    def context_length(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        return int(self.module.config.get_text_config().max_position_embeddings)


def load_model(
    files: ModelFiles,
    *,
    dtype: str,
    quantization: str,
    device: str,
    attn_implementation: str,
    trust_remote_code: bool = False,
    cache_dir: Path | None = None,
) -> LoadedModel:
    """Load a causal LM. A GGUF is dequantised once and kept as safetensors in the cache folder.

    Raises InvalidArgument naming `model` for a model that cannot be served, and for a device that is not there.
    """
    transformers_logging.disable_progress_bar()
    place = _device(device)
    dtype_name = _native_dtype(place) if dtype == "auto" else dtype
    if files.gguf_file is not None:
        files = _dequantized(files, dtype_name, cache_dir or default_cache_dir())
    try:
        config = AutoConfig.from_pretrained(files.directory, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise InvalidArgument(f"{files.reference} cannot be read: {error}", "model") from error
    _refuse_unserved(files.reference, config)
    module = AutoModelForCausalLM.from_pretrained(
        files.directory,
        config=config,
        dtype=_DTYPES[dtype_name],
        attn_implementation=attn_implementation,
        device_map=place,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
    )
    module.requires_grad_(False).eval()
    if quantization == "int8":
        if place.type != "cpu":
            raise InvalidArgument("int8 linear layers run on a CPU only", "quantization")
        quantize_int8(module)
    tokenizer = AutoTokenizer.from_pretrained(files.directory, trust_remote_code=trust_remote_code)
    eos_token_id = module.generation_config.eos_token_id
    return LoadedModel(
        module=module,
        tokenizer=describe_tokenizer(tokenizer, config.eos_token_id if eos_token_id is None else eos_token_id),
        reference=files.reference,
        revision=files.revision,
        dtype=_DTYPES[dtype_name],
        dtype_name=dtype_name,
        quantization=quantization,
        device=place,
    )


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("no CUDA device is to be had; use --device cpu, or a CUDA build of torch", "device")
    has_cuda = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if has_cuda else "cpu")


def _native_dtype(device: torch.device) -> str:
    """bfloat16 where the processor multiplies it, float32 on CPUs that would only emulate it."""
    if device.type == "cuda":
        return "bfloat16"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def _refuse_unserved(reference: str, config: PretrainedConfig) -> None:
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise InvalidArgument(f"{reference} is an encoder-decoder; a causal LM is needed", "model")
    for name in _UNSERVED_ATTENTION:
        if getattr(text, name, None):
            raise InvalidArgument(f"{reference} uses {name}, which tree attention does not serve", "model")
    if unserved := set(getattr(text, "layer_types", None) or ()) - _SERVED_LAYERS:
        raise InvalidArgument(f"{reference} has layers of type {', '.join(sorted(unserved))}, not served", "model")


def _dequantized(files: ModelFiles, dtype_name: str, cache_dir: Path) -> ModelFiles:
    """The same model as a folder of safetensors, made once: unpacking a GGUF takes longer than loading the result."""
    folder = cache_dir / "dequantized" / f"{files.revision}-{dtype_name}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            with told(f"unpacking {files.reference} to {dtype_name} (once) ..."):
                _dequantize(files, dtype_name, folder)
    return replace(files, directory=folder, gguf_file=None)


def _dequantize(files: ModelFiles, dtype_name: str, folder: Path) -> None:
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.directory, gguf_file=files.gguf_file)
        tokenizer.save_pretrained(partial)
        module = AutoModelForCausalLM.from_pretrained(
            files.directory,
            gguf_file=files.gguf_file,
            dtype=_DTYPES[dtype_name],
            quantization_config=GgufConfig(dequantize=True),
        )
        if hasattr(module.config, "quantization_config"):
            del module.config.quantization_config
        module.save_pretrained(partial)
    except (ValueError, NotImplementedError) as error:
        shutil.rmtree(partial)
        raise InvalidArgument(f"{files.reference} is no GGUF that can be unpacked: {error}", "model") from error
    partial.rename(folder)
