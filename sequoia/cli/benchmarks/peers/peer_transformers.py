"""`transformers` generate: "plain", with the draft ("assisted"), with n-grams of the prompt ("prompt-lookup")."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import transformers
from peer_protocol import Answer, Peer, serve
from transformers.generation.streamers import BaseStreamer

_NUM_LOOKUP_TOKENS = 10


def load(request: dict[str, Any]) -> Peer:
    """As it comes: not compiled, the library's own choice of attention, its own schedule of assistant tokens."""
    torch.set_num_threads(request["num_threads"])
    target = _model(request["target"], request["dtype"])
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": request["eos_token_ids"], "pad_token_id": 0}
    if request["variant"] == "assisted":
        options["assistant_model"] = _model(request["draft"], request["dtype"])
    if request["variant"] == "prompt-lookup":
        options["prompt_lookup_num_tokens"] = _NUM_LOOKUP_TOKENS
    engine = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return Peer(engine, _settings(request, target), lambda prompt, most: _answer(target, prompt, most, options))


class _Clock(BaseStreamer):
    """When tokens came. `generate` first puts the prompt, then what each step committed."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _model(files: dict[str, Any], dtype: str) -> Any:
    element = getattr(torch, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(files["folder"], dtype=element, use_safetensors=True)
    model.eval().requires_grad_(False)
    # A checkpoint's own sampling parameters are no business of greedy decoding.
    model.generation_config = transformers.GenerationConfig()
    return model


def _settings(request: dict[str, Any], target: Any) -> str:
    variant = {"assisted": ", assisted by the draft", "prompt-lookup": f", {_NUM_LOOKUP_TOKENS} tokens looked up"}
    attention = target.config._attn_implementation
    return f"{request['dtype']}, eager, {attention} attention{variant.get(request['variant'], '')}"


def _answer(target: Any, prompt: list[int], max_tokens: int, options: dict[str, Any]) -> Answer:
    inputs, clock = torch.tensor([prompt]), _Clock()
    start = time.perf_counter()
    with torch.inference_mode():
        output = target.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_tokens, streamer=clock, **options
        )
    seconds = time.perf_counter() - start
    _, *steps = clock.times
    return Answer(output[0, len(prompt) :].tolist(), seconds, steps[0] - start, len(steps))


if __name__ == "__main__":
    sys.exit(serve(load))
