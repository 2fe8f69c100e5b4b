"""vLLM's engine, stepped in this process, so that the first token is seen: plain ("plain") or drafted ("draft")."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from peer_protocol import Answer, Peer, serve

# Read when vllm is imported. One process; KV memory in GiB, of which one session needs little.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

import torch
import vllm
from vllm.sampling_params import RequestOutputKind

_NUM_DRAFT_TOKENS = 4


def load(request: dict[str, Any]) -> Peer:
    """Eager: compiling takes minutes, and needs a compiler."""
    torch.set_num_threads(request["num_threads"])
    model = vllm.LLM(
        model=request["target"]["folder"],
        dtype=request["dtype"],
        max_model_len=request["context_length"],
        max_num_seqs=1,
        enable_prefix_caching=False,
        enforce_eager=True,
        speculative_config=_speculation(request),
    )
    ends = request["eos_token_ids"]
    return Peer(
        f"vllm {vllm.__version__}, torch {torch.__version__}",
        f"{request['dtype']}, eager{f', {_NUM_DRAFT_TOKENS} tokens drafted a step' * (request['variant'] == 'draft')}",
        lambda prompt, most: _answer(model.llm_engine, prompt, most, ends),
    )


def _speculation(request: dict[str, Any]) -> dict[str, Any] | None:
    if request["variant"] != "draft":
        return None
    return {"method": "draft_model", "model": request["draft"]["folder"], "num_speculative_tokens": _NUM_DRAFT_TOKENS}


def _answer(engine: Any, prompt: list[int], max_tokens: int, ends: list[int]) -> Answer:
    params = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        stop_token_ids=ends,
        output_kind=RequestOutputKind.DELTA,
        detokenize=False,
    )
    tokens: list[int] = []
    start = time.perf_counter()
    first_token_seconds = 0.0
    engine.add_request(f"{start}", {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens += output.outputs[0].token_ids
        if tokens and not first_token_seconds:
            first_token_seconds = time.perf_counter() - start
    return Answer(tokens, time.perf_counter() - start, first_token_seconds)


if __name__ == "__main__":
    sys.exit(serve(load))
