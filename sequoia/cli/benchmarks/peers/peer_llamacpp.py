"""llama.cpp's server, in this process: plain ("plain") or with the draft ("draft")."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from importlib.metadata import version
from typing import Any

import xllamacpp
from peer_protocol import Answer, Peer, serve

_NUM_DRAFT_TOKENS = 4


def load(request: dict[str, Any]) -> Peer:
    """One slot, no prompt cache. Raises ValueError for a model without a GGUF file."""
    params = xllamacpp.CommonParams()
    params.model.path = _gguf(request["target"])
    params.n_ctx = request["context_length"]
    params.n_parallel = 1
    params.cpuparams.n_threads = request["num_threads"]
    params.cpuparams_batch.n_threads = request["num_threads"]
    params.n_gpu_layers = 0
    settings = f"the GGUF file's weights, {_instructions()}"
    if request["variant"] == "draft":
        _add_draft(params, request)
        settings += f", up to {_NUM_DRAFT_TOKENS} tokens drafted a step"
    server = xllamacpp.Server(params)
    # The server lives as long as the peer: whoever holds `answer` holds it.
    return Peer(
        f"llama.cpp (xllamacpp {version('xllamacpp')})",
        settings,
        lambda prompt, most: _answer(server.listening_address, prompt, most),
    )


def _add_draft(params: Any, request: dict[str, Any]) -> None:
    params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    draft = params.speculative.draft
    draft.mparams.path = _gguf(request["draft"])
    draft.n_max = _NUM_DRAFT_TOKENS
    draft.n_gpu_layers = 0
    draft.cpuparams.n_threads = request["num_threads"]
    draft.cpuparams_batch.n_threads = request["num_threads"]


def _gguf(files: dict[str, Any]) -> str:
    if files["gguf"] is None:
        raise ValueError("llama.cpp needs a GGUF file")
    return str(files["gguf"])


def _instructions() -> str:
    """The widest vector instructions that this build was made for, whatever the machine has."""
    built = xllamacpp.get_system_info()
    return next((f"{name} build" for name in ("AVX512", "AVX2", "NEON") if f"{name} = 1" in built), "a plain build")


def _answer(address: str, prompt: list[int], max_tokens: int) -> Answer:
    request = {
        "prompt": prompt,
        "n_predict": max_tokens,
        "temperature": 0.0,
        "return_tokens": True,
        "cache_prompt": False,
    }
    body, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
    start = time.perf_counter()
    # Its own endpoint: those that need no HTTP give no token ids.
    with urllib.request.urlopen(urllib.request.Request(f"{address}/completion", body, headers)) as response:
        result = json.load(response)
    seconds = time.perf_counter() - start
    timings, tokens = result["timings"], result["tokens"]
    return Answer(tokens, seconds, timings["prompt_ms"] / 1e3, len(tokens) - timings.get("draft_n_accepted", 0))


if __name__ == "__main__":
    sys.exit(serve(load))
