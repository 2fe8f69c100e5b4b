"""Many requests asked for at once: their wire form, and what ends them together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import grpc

from sequoia.errors import InvalidArgument
from sequoia.options import Prompt, RequestOptions, build_request
from sequoia.v1 import coordinator_pb2 as pb

DEFAULT_CONCURRENCY = 16


def build_requests(
    prompts: Iterable[Prompt], seeds: Iterable[int] | None, options: RequestOptions
) -> list[pb.GenerateRequest]:
    """A request a prompt. Raises InvalidArgument naming `prompts`, `prompts[i]`, `seeds`, `seeds[i]` or the option."""
    if isinstance(prompts, str | bytes):
        raise InvalidArgument("give a list of prompts, not one string", "prompts")
    asked = _listed(prompts, "prompts")
    if seeds is None:
        return [_build(prompt, options, {"prompt": f"prompts[{index}]"}) for index, prompt in enumerate(asked)]
    if options.get("seed") is not None:
        raise InvalidArgument("give one seed for all, or one for each, not both", "seeds")
    drawn = _listed(seeds, "seeds", len(asked) + 1)
    if len(drawn) != len(asked):
        raise InvalidArgument(f"give as many as prompts, which are {len(asked)}", "seeds")
    return [
        _build(prompt, {**options, "seed": seed}, {"prompt": f"prompts[{index}]", "seed": f"seeds[{index}]"})
        for index, (prompt, seed) in enumerate(zip(asked, drawn, strict=True))
    ]


def checked_concurrency(max_concurrency: int) -> int:
    """As it is. Raises InvalidArgument naming it unless it is a whole number from 1."""
    if not isinstance(max_concurrency, int) or max_concurrency < 1:
        raise InvalidArgument(f"{max_concurrency!r} is not a whole number from 1", "max_concurrency")
    return max_concurrency


class Calls:
    """Calls that run in several threads and can be ended together."""

    def __init__(self) -> None:
        self.is_cancelled = False
        self._running: set[grpc.RpcContext] = set()

    @contextmanager
    def running(self, call: grpc.RpcContext) -> Iterator[None]:
        """Around the reading of a call, which is over afterwards."""
        self._running.add(call)
        try:
            # Asked after the call was added: who cancels at this moment either finds it or is seen here.
            if self.is_cancelled:
                call.cancel()
            yield
        finally:
            self._running.discard(call)
            call.cancel()

    def cancel(self) -> None:
        """End those that run, and those that begin later."""
        self.is_cancelled = True
        for call in self._running.copy():
            call.cancel()


def _build(prompt: Prompt, options: RequestOptions, names: dict[str, str]) -> pb.GenerateRequest:
    try:
        return build_request(prompt, options)
    except InvalidArgument as error:
        raise InvalidArgument(error.message, names.get(error.field, error.field)) from error


def _listed(values: Iterable, name: str, most: int | None = None) -> list:
    try:
        return list(islice(values, most))
    except TypeError as error:
        raise InvalidArgument(f"{values!r} is not a list", name) from error
