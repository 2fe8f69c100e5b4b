"""OpenVINO GenAI on the weights of a GGUF file: plain ("plain") or with the draft ("draft")."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from peer_protocol import Answer, Peer, serve

_NUM_ASSISTANT_TOKENS = 4
# Of KV memory; one session needs little.
_CACHE_GIB = 1


def load(request: dict[str, Any]) -> Peer:
    """The CPU plug-in, tuned for latency. Raises ValueError for a model without a GGUF file."""
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": request["num_threads"]}
    config = openvino_genai.GenerationConfig(
        do_sample=False, apply_chat_template=False, stop_token_ids=set(request["eos_token_ids"])
    )
    settings = f"the GGUF file's weights, {_numerics()}"
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = _CACHE_GIB
    scheduler.enable_prefix_caching = False
    options: dict[str, Any] = {"scheduler_config": scheduler}
    if request["variant"] == "draft":
        config.num_assistant_tokens = _NUM_ASSISTANT_TOKENS
        options["draft_model"] = openvino_genai.draft_model(_converted(request["draft"]), "CPU", **properties)
        settings += f", {_NUM_ASSISTANT_TOKENS} tokens drafted a step"
    pipeline = openvino_genai.LLMPipeline(_converted(request["target"]), "CPU", **properties, **options)
    return Peer(
        f"openvino-genai {openvino_genai.__version__.split('-')[0]}",
        settings,
        lambda prompt, most: _answer(pipeline, config, prompt, most),
    )


def _converted(files: dict[str, Any]) -> str:
    """The GGUF file in OpenVINO's own format, of the same weights: only that serves as a draft."""
    if files["gguf"] is None:
        raise ValueError("openvino-genai needs a GGUF file, or a model that was converted for it")
    cache = Path(files["cache"])
    if not (cache / "openvino").exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            folder = Path(scratch) / "openvino"
            _convert(files["gguf"], folder)
            folder.rename(cache / "openvino")
    return str(cache / "openvino")


def _convert(gguf: str, folder: Path) -> None:
    """What the pipeline makes lies beside the file that it reads."""
    folder.mkdir()
    link = folder / "model.gguf"
    link.symlink_to(gguf)
    try:
        openvino_genai.LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
    except RuntimeError as error:
        raise ValueError(f"openvino-genai cannot read {gguf}: {str(error).strip().splitlines()[-1]}") from error


def _numerics() -> str:
    core = openvino.Core()
    names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    compute, kv, group = (core.get_property("CPU", name) for name in names)
    quantized = f", activations in 8 bits by {group}" if group else ""
    return f"{compute.get_type_name()} arithmetic{quantized}, KV in {kv.get_type_name()}"


def _answer(pipeline: Any, config: Any, prompt: list[int], max_tokens: int) -> Answer:
    ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
    inputs = openvino_genai.TokenizedInputs(ids, openvino.Tensor(np.ones((1, len(prompt)), dtype=np.int64)))
    config.max_new_tokens = max_tokens
    start = time.perf_counter()
    result = pipeline.generate(inputs, config)
    seconds = time.perf_counter() - start
    return Answer([int(token) for token in result.tokens[0]], seconds, result.perf_metrics.get_ttft().mean / 1e3)


if __name__ == "__main__":
    sys.exit(serve(load))
