"""How a peer talks: JSON objects, one a line. The first that it reads names the models, each other one is a prompt.

    {"target": {"folder": DIR, "gguf": FILE or null}, "draft": the same or null, "variant": TEXT, "dtype": TEXT,
     "num_threads": N, "context_length": N, "eos_token_ids": [N, ...]}
    -> {"engine": NAME AND VERSION, "settings": TEXT}
    {"prompt_token_ids": [N, ...], "max_tokens": N}
    -> {"token_ids": [N, ...], "seconds": X, "first_token_seconds": X, "num_steps": N or null}
    -> {"error": TEXT} instead of either, and the peer ends

Decoding is greedy and ends at `max_tokens` or with a token of `eos_token_ids`, which may be left out of the answer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Answer:
    """What one prompt gave. `num_steps`: forwards of the target that committed tokens; None where nobody knows."""

    token_ids: list[int]
    seconds: float
    first_token_seconds: float
    num_steps: int | None = None


class Peer(NamedTuple):
    """A loaded engine: its name and version, how it decodes, and how it answers (prompt token ids, most tokens)."""

    engine: str
    settings: str
    answer: Callable[[list[int], int], Answer]


def serve(load: Callable[[dict[str, Any]], Peer]) -> int:
    """Load what the first line says, answer the others until they end. Returns the exit status."""
    # Libraries print: from here on that goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        peer = load(json.loads(sys.stdin.readline()))
        _tell(answers, {"engine": peer.engine, "settings": peer.settings})
        for line in sys.stdin:
            request = json.loads(line)
            _tell(answers, asdict(peer.answer(request["prompt_token_ids"], request["max_tokens"])))
    except Exception as error:  # noqa: BLE001  whatever it is, the benchmark goes on without this peer
        _tell(answers, {"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _tell(answers: Any, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()
