"""What a request asks of the coordinator, from the body of an HTTP request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from coordinator.gateway.body import Body
from coordinator.gateway.conversation import read_messages
from coordinator.gateway.fields import Endpoint, check_names
from coordinator.gateway.options import read_options
from coordinator.gateway.tool_use import ToolUse, read_tool_use
from sequoia.errors import InvalidArgument
from sequoia.options import Prompt, RequestOptions

MAX_CHOICES = 32
_COMPLETION_TOKENS = 16
# The coordinator ends an answer where the context does.
_ALL_THERE_IS_ROOM_FOR = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that is well-formed; what its values may be is the coordinator's to say.

    `names` are the coordinator's fields that this body has by other names.
    """

    endpoint: Endpoint
    model: str
    prompts: tuple[Prompt, ...]
    options: RequestOptions
    num_choices: int = 1  # for each prompt
    streams: bool = False
    tells_usage: bool = False  # at the end of a stream
    tells_logprobs: bool = False
    shows_speculation: bool = False
    echoes: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    tool_use: ToolUse | None = None

    @property
    def requests(self) -> Iterator[tuple[Prompt, RequestOptions]]:
        """One for every choice, those of the first prompt first. Choice i of a prompt has seed + i."""
        seed = self.options.get("seed")
        for prompt in self.prompts:
            for index in range(self.num_choices):
                yield prompt, self.options if seed is None else {**self.options, "seed": seed + index}


def read_chat(body: Body) -> Asked:
    """A body of /v1/chat/completions. Raises InvalidArgument naming the field."""
    check_names(body.fields, "chat")
    limits = {name: body.whole(name) for name in ("max_completion_tokens", "max_tokens")}
    given = [name for name, value in limits.items() if value is not None]
    if len(given) > 1:
        raise InvalidArgument("is the old name of max_completion_tokens; leave one of the two out", "max_tokens")
    is_told, num_top = body.flag("logprobs") or False, body.whole("top_logprobs")
    if num_top is not None and not is_told:
        raise InvalidArgument("goes with logprobs: true", "top_logprobs")
    options = read_options(body)
    options["max_tokens"] = limits[given[0]] if given else _ALL_THERE_IS_ROOM_FOR
    names = {"logprobs": "top_logprobs", **({"max_tokens": given[0]} if given else {})}
    if (tool_use := read_tool_use(body)) is not None:
        options |= tool_use.options
        names["response_format"] = "tools"
    num_logprobs = num_top or 0 if is_told else None
    return _asked(
        body, "chat", (read_messages(body),), options, num_logprobs=num_logprobs, names=names, tool_use=tool_use
    )


def read_completion(body: Body) -> Asked:
    """A body of /v1/completions. Raises InvalidArgument naming the field."""
    best_of, num_choices = body.whole("best_of"), body.whole("n") or 1
    # All of as many as were asked for are the best of them.
    fields = {name: value for name, value in body.fields.items() if name != "best_of" or best_of != num_choices}
    check_names(fields, "completions")
    options = read_options(body)
    limit = body.whole("max_tokens")
    options["max_tokens"] = _COMPLETION_TOKENS if limit is None else limit
    num_logprobs, prompts = body.whole("logprobs"), _prompts(body)
    echoes = body.flag("echo") or False
    if echoes and num_logprobs is not None:
        raise InvalidArgument("goes without logprobs: those of the prompt are not known", "echo")
    if echoes and not all(isinstance(each, str) for each in prompts):
        raise InvalidArgument("goes with prompts that are text", "echo")
    return _asked(body, "completions", prompts, options, num_logprobs=num_logprobs, echoes=echoes)


def _asked(
    body: Body,
    endpoint: Endpoint,
    prompts: tuple[Prompt, ...],
    options: RequestOptions,
    *,
    num_logprobs: int | None,
    echoes: bool = False,
    names: Mapping[str, str] | None = None,
    tool_use: ToolUse | None = None,
) -> Asked:
    streams, shows = body.flag("stream") or False, body.flag("show_speculation") or False
    # Who wrote which piece of text is told by the bytes of tokens, which come with logprobs.
    options["logprobs"] = 0 if num_logprobs is None and shows else num_logprobs
    model = body.text("model")
    if not model:
        raise InvalidArgument("is missing; /v1/models lists the one that is served", "model")
    return Asked(
        endpoint,
        model,
        prompts,
        options,
        _num_choices(body, len(prompts)),
        streams,
        _tells_usage(body, streams=streams),
        num_logprobs is not None,
        shows,
        echoes,
        names or {},
        tool_use,
    )


def _num_choices(body: Body, num_prompts: int) -> int:
    n = body.whole("n")
    if n is not None and not 1 <= n * num_prompts <= MAX_CHOICES:
        raise InvalidArgument(f"is {n}; with the prompts it must make 1 to {MAX_CHOICES} answers", "n")
    if num_prompts > MAX_CHOICES:
        raise InvalidArgument(f"are {num_prompts}; send at most {MAX_CHOICES} at a time", "prompt")
    return n or 1


def _tells_usage(body: Body, *, streams: bool) -> bool:
    options = body.group("stream_options")
    if options is None:
        return False
    if not streams:
        raise InvalidArgument("goes with stream: true", "stream_options")
    for name, value in options.fields.items():
        # What hides the lengths of pieces from eavesdroppers is not made, which is what false asks for.
        if name != "include_usage" and not (name == "include_obfuscation" and value in (None, False)):
            raise InvalidArgument("is not served; leave it out", options.name_of(name))
    return options.flag("include_usage") or False


def _prompts(body: Body) -> tuple[Prompt, ...]:
    if not isinstance(body.fields.get("prompt"), list):
        text = body.text("prompt")
        if text is None:
            raise InvalidArgument("is missing; give a string, token ids, or a list of either", "prompt")
        return (text,)
    prompts = body.items("prompt") or []
    if prompts and all(map(_is_token_id, prompts)):
        return (tuple(prompts),)
    if prompts and all(isinstance(each, str) or _is_token_ids(each) for each in prompts):
        named = Body({f"prompt[{index}]": each for index, each in enumerate(prompts)})
        return tuple(
            (named.text(name) or "") if isinstance(each, str) else tuple(each) for name, each in named.fields.items()
        )
    raise InvalidArgument("give a string, token ids, or a list of either", "prompt")


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_token_id, value))
