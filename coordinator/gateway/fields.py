"""What each field of a request body means here. A field that is in none of these tables is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from sequoia.errors import InvalidArgument

Endpoint = Literal["chat", "completions"]
ENDPOINTS: tuple[Endpoint, ...] = ("chat", "completions")

_SHARED = {
    "model": "the name that `/v1/models` lists, or one of `--model-names`",
    "max_tokens": "default: 16 for completions; for chats what the context has room for, as with OpenAI",
    "temperature": "default 1; 0 is greedy",
    "top_p": "exact",
    "presence_penalty": "exact, at every node of a tree",
    "frequency_penalty": "exact, at every node of a tree",
    "logit_bias": "exact; token ids to -100..100",
    "seed": "one seed, one text, whatever the draft and the tree; choice i has seed + i",
    "stop": "a string or up to 16; the answer ends before the first",
    "response_format": "exact, at every node of a tree; `text`, `json_object`, `json_schema`; the model is not told",
    "n": "as many requests at a time; prompts times n is at most 32",
    "stream": "server-sent events",
    "stream_options": "`include_usage`",
}
_OURS = {
    "top_k": "ours: exact",
    "min_p": "ours: exact",
    "repetition_penalty": "ours: exact",
    "min_tokens": "ours: nothing ends the answer before",
    "ignore_eos": "ours: go on at the model's own end-of-sequence tokens",
    "stop_token_ids": "ours: tokens that end the answer",
    "rule": "ours: the rule that verifies",
    "speculation": 'ours: "auto", "off", "tree", `{"parents": [...]}` or `{"size", "levels", "width"}`',
    "show_speculation": "ours: pieces of text come with who wrote them, draft or target",
}
# Fields that are honoured exactly, and how.
HONOURED: Mapping[Endpoint, Mapping[str, str]] = {
    "chat": {
        "messages": "roles system, developer (as system), user, assistant and tool; text, whole or in parts",
        **_SHARED,
        "max_completion_tokens": "as `max_tokens`",
        "logprobs": "logarithms of the model's own probabilities, before temperature and cuts",
        "top_logprobs": "0 to 20",
        "tools": "functions, told by the model's chat template; it is refused where that has no place for them",
        "tool_choice": "`none`, `auto`, `required` or a function; the last two exact, at every node of a tree",
        "parallel_tool_calls": "a call that is required is one, whatever it says",
        **_OURS,
    },
    "completions": {
        "prompt": "a string, token ids, or a list of either",
        **_SHARED,
        "logprobs": "0 to 20; logarithms of the model's own probabilities, before temperature and cuts",
        "echo": "of prompts that are text, without logprobs",
        **_OURS,
    },
}
# Labels: nothing in an answer could depend on them.
LABELS = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
_FUNCTIONS = "the old name of tools"
# Fields that are refused unless they ask for what happens anyway (or are null): those values, and the reason.
REFUSED: Mapping[Endpoint, Mapping[str, tuple[tuple[Any, ...], str]]] = {
    "chat": {
        "functions": (([],), _FUNCTIONS),
        "function_call": (("none",), _FUNCTIONS),
        "modalities": ((["text"],), "answers are text"),
        "audio": ((), "answers are text"),
        "prediction": ((), "what the draft guesses is its own business"),
        "reasoning_effort": (("none",), "the model is not told how long to think"),
        "verbosity": ((), "the model is not told how much to say"),
        "web_search_options": ((), "nothing is searched"),
        "moderation": ((), "nothing is moderated"),
        "prompt_cache_options": ((), "nothing is kept for the next request"),
        "store": ((False,), "nothing is stored"),
        "metadata": (({},), "nothing is stored"),
        "service_tier": (("auto", "default"), "there is one"),
    },
    "completions": {
        "suffix": (("",), "text is written from front to back"),
        "best_of": ((), "there is no choosing among answers; ask for n and choose"),
    },
}


def check_names(body: Mapping[str, Any], endpoint: Endpoint) -> None:
    """Raises InvalidArgument naming the first field of the body that is not known or not served."""
    for name, value in body.items():
        if name in HONOURED[endpoint] or name in LABELS:
            continue
        if name not in REFUSED[endpoint]:
            raise InvalidArgument("is not known here, and nothing is ignored; leave it out", name)
        harmless, reason = REFUSED[endpoint][name]
        if value is not None and not any(type(value) is type(each) and value == each for each in harmless):
            raise InvalidArgument(f"is not served: {reason}; leave it out", name)


def table() -> str:
    """All of it in Markdown, for the documentation."""
    lines = ["| field | chat | completions | |", "|---|---|---|---|"]
    for name in dict.fromkeys(name for each in ENDPOINTS for name in (*HONOURED[each], *REFUSED[each])):
        told = {each: HONOURED[each].get(name) or _refusal(each, name) for each in ENDPOINTS}
        notes = dict.fromkeys(filter(None, told.values()))
        verdicts = (_verdict(each, name) for each in ENDPOINTS)
        lines.append(f"| `{name}` | {' | '.join(verdicts)} | {'; '.join(notes)} |")
    labels = ", ".join(f"`{name}`" for name in LABELS)
    lines.append(f"| {labels} | taken | taken | labels: nothing in an answer depends on them |")
    return "\n".join(lines)


def _verdict(endpoint: Endpoint, name: str) -> str:
    if name in HONOURED[endpoint]:
        return "honoured"
    return "refused" if name in REFUSED[endpoint] else "not known"


def _refusal(endpoint: Endpoint, name: str) -> str:
    harmless, reason = REFUSED[endpoint].get(name, ((), ""))
    values = " or ".join(f"`{json.dumps(each)}`" for each in harmless)
    return f"{reason} ({values} is taken)" if values else reason
